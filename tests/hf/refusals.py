"""Families that cannot be exact, and words of the refusal; model types of transformers."""

REFUSALS = {
    "lfm3": "layers of type conv",
    "zamba2": "layers of type hybrid, linear_attention, of which ringattn knows 0",
    "bailing_hybrid": "layers of type linear_attention, of which ringattn knows 0",
    "mamba": "layers of type linear_attention, of which ringattn knows 0",
    "falcon_mamba": "layers of type linear_attention, of which ringattn knows 0",
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
