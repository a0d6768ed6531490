"""Keys of transformers' decoders that may look past one token, draw, or depend on a length, and what becomes of them.

Those that are refused stand in `ringattn.hf.configuration`; a test finds the others by their names, so that a version
of transformers with a new one fails it.
"""

SUSPICIOUS = (
    "alibi|altup_coef|attn_temperature|aux|batch|capacity|chunk_size|cross_att|drop|floor_scale|jitter|layerdrop|"
    "log_scaling|logits_to_keep|loop_num|loss|mem_len|mtp|ngram|nextn|noise|output_att|output_router|^ple_|pooling|"
    "prefix_lm|random|router_logits|segment|shift|shuffle|sparsity|token_type|use_prompt"
)
_DRAWN = "drawn for each token, apart on every rank"
_ATTENTION = "in training refused by the attention layer that asks for it"
_CLASSIFIER = "of heads that pool over a sequence, which are refused"
_NO_HEADS = "transformers builds no heads that predict later tokens"
TOKEN_KEYS = {
    "dropout": _DRAWN,
    "embd_pdrop": _DRAWN,
    "embedding_dropout": _DRAWN,
    "hidden_dropout": _DRAWN,
    "hidden_dropout_prob": _DRAWN,
    "input_jitter_noise": _DRAWN,
    "mlp_dropout": _DRAWN,
    "resid_pdrop": _DRAWN,
    "residual_dropout": _DRAWN,
    "router_jitter_noise": _DRAWN,
}
ROUTER_KEYS = {
    "aux_loss_coef": "what that loss is multiplied with",
    "output_router_logits": "the loss of routers, over all tokens of a stream",
    "router_aux_loss_coef": "what that loss is multiplied with",
}
INERT_KEYS = {
    "activation_sparsity_pattern": "a quantile of one token's features",
    "altup_coef_clip": "of weights",
    "attention_chunk_size": "a mask, counted in documents",
    "attention_dropout": _ATTENTION,
    "attention_probs_dropout_prob": _ATTENTION,
    "attn_pdrop": _ATTENTION,
    "attn_temperature_tuning": "exact up to the length that is checked for every batch",
    "classifier_dropout": _CLASSIFIER,
    "classifier_dropout_prob": _CLASSIFIER,
    "floor_scale": "exact up to the length that is checked for every batch",
    "mtp_layer_types": _NO_HEADS,
    "mtp_mlp_layer_types": _NO_HEADS,
    "num_logits_to_keep": "for generation",
    "num_nextn_predict_layers": _NO_HEADS,
    "summary_first_dropout": _CLASSIFIER,
    "summary_last_dropout": _CLASSIFIER,
}
# Attention outside of transformers' interface, states that go from token to token, encoder-decoders.
OF_REFUSED_TYPES = {
    "chunk_size",
    "resid_dropout",
    "embed_dropout",
    "emb_pdrop",
    "activation_dropout",
    "chunk_size_lm_head",
    "cross_attention_hidden_size",
    "cross_attn_k",
    "disable_ngram_loss",
    "dropout_p",
    "encoder_layerdrop",
    "encoder_no_repeat_ngram_size",
    "heads_per_ngram",
    "local_attention_probs_dropout_prob",
    "log_scaling_alpha",
    "log_scaling_n_floor",
    "loop_num_passes",
    "lsh_attention_probs_dropout_prob",
    "make_ngram_vocab_size_divisible_by",
    "mamba_chunk_size",
    "mem_len",
    "mtp_hidden_states_first",
    "mtp_layers_block_type",
    "mtp_local_layer_ids",
    "mtp_loss_scaling_factor",
    "ngram",
    "ngram_size",
    "ngram_vocab_size_base",
    "num_mtp_layers",
    "num_random_blocks",
    "patching_batch_size",
    "ple_conv_kernel_size",
    "ple_embed_dim",
    "pooling",
    "prefix_lm",
    "segment_types",
    "split_ngram_parts",
    "use_prompt",
    "z_loss_coefficient",
}
