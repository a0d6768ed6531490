"""Families that cannot be exact, and words of the refusal; model types of transformers."""

REFUSALS = {
    "lfm3": "layers of type conv",
    "deepseek_v4": "compressed_sparse_attention",
    "deepseek_v32": "indexed_attention",
    "bloom": "outside transformers' AttentionInterface",
    "gptj": "outside transformers' AttentionInterface",
    "falcon": "outside transformers' AttentionInterface",
    "mpt": "outside transformers' AttentionInterface",
    "t5": "encoder-decoder",
    "inkling_text": "layers of type hybrid",
    "roberta": "from the padding id",
    "diffllama": "more than once",
    "hrm_text": "16 of its 4 attention layers",
    "doge": "works on its attention mask itself",
}
