"""Training steps of a whole model: ringattn beside the plain Hugging Face loop and DeepSpeed's pieces of ALST.

    python -m benchmarks.training --layers 8 --seq-len 32k,64k --rows ours,hf,alst --floor
    torchrun --nproc-per-node 2 -m benchmarks.training --layers 8 --seq-len 128k --dry-attention also
    python -m benchmarks.training --layers 32 --longest --rows ours,alst --gpus 2

All rows run in one process on the same kernel, one after another, with the same weights, documents and optimizer
states.
"""
