"""What a run will hold and how long a step will take, from shapes alone: no weights, no GPU, no process group.

`shapes`: a model and a run in numbers. `states`, `layer`, `head`, `attention`: what is alive, part by part. `alive`:
all of it at each moment of a step. `rates`, `step_time`: seconds. `choice`: the fastest settings that fit, and the
longest length.
"""
