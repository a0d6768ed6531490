"""One HTML page about a run: what it recorded (`record.py`, `folder.py`), in pictures (`charts.py`, `attention.py`)."""
