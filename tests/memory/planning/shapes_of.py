"""Shapes of models in numbers, without transformers."""

from ringattn.mask import Mask
from ringattn.memory.planning.parts import Mlp, Parts, Weights
from ringattn.memory.planning.shapes import ModelShape


def llama_8b(layers: int = 32) -> ModelShape:
    """Llama-3.1-8B's."""
    return ModelShape(
        name="llama_8b",
        hidden=4096,
        query_heads=32,
        key_heads=8,
        head_dim=128,
        vocabulary=128256,
        layers=(Weights(218112000, 218112000, 9),) * layers,
        parts=(Parts(mlp=Mlp(Weights(176160768, 176160768, 3), 14336)),) * layers,
        active=218103808,
        embedding=Weights(525336576, 525336576),
        head=Weights(525336576, 525336576),
        rest=Weights(4096, 4096),
        masks=((Mask(), layers),),
    )
