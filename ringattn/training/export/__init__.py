"""From a run's folder to a folder that transformers and vLLM load: weights, configuration, tokenizer, model card.

`run_folder.py` finds the run and its checkpoint, `trained.py` gives the trained weights one by one, `writing.py` writes
them so, `beside.py` and `card.py` what stands beside them, `folder.py` does it all. No device and no process group.
"""

from ringattn.training.export.folder import ExportOptions, export

__all__ = ["ExportOptions", "export"]
