"""Sub-commands of `ringattn`, one module each.

A module's name is the command's, its docstring the help. It has `add_arguments(parser)` and `run(args) -> exit code`,
and imports at its top nothing that is slow or optional, for every one is imported to show the help. Where its parser
has a default for `overrides`, that is the list of all arguments that the parser does not know.
"""
