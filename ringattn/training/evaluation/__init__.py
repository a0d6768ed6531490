"""What a model can do, measured with its tokens split over ranks; nothing of size tokens × vocabulary is gathered.

`head.py` looks at a model's head in tiles, `scoring.py` scores packs with it, `passes.py` takes every document once.
`validation.py` is for training runs; the other modules are what `recipes/evaluate.py` is made of.
"""
