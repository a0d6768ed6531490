"""TRL's SFTTrainer on a mesh: conversations with loss on the assistant's turns, each shared by two ranks.

    torchrun --nproc-per-node 2 examples/trl_sft.py

`OnMesh` before TRL's class is all. Model, tokenizer and data are tiny and made here, so that nothing is downloaded.
"""

import tempfile

import torch
import torch.distributed as dist
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from ringattn import init_mesh
from ringattn.hf.trainer import OnMesh

WORDS = ["<pad>", "<eos>", *(f"w{number}" for number in range(62))]
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }} <eos>"
    "{% endgeneration %}{% else %}{{ message['content'] }} {% endif %}{% endfor %}"
)


class SequenceSFTTrainer(OnMesh, SFTTrainer):
    """SFTTrainer whose rows are shared by the ranks of a sequence."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE)


def conversations(count: int) -> Dataset:
    """The assistant counts on from the number that it is told."""
    rows = []
    for start in range(count):
        answer = " ".join(f"w{(start + number) % 62}" for number in range(1, 17))
        turns = [{"role": "user", "content": f"w{start % 62}"}, {"role": "assistant", "content": answer}]
        rows.append({"messages": turns})
    return Dataset.from_list(rows)


def main() -> None:
    mesh = init_mesh()
    torch.manual_seed(0)  # the same weights on every rank
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=512, **shape))
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder, max_steps=30, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=10,
            logging_first_step=True, assistant_only_loss=True, lr_scheduler_type="constant", save_strategy="no",
            gradient_checkpointing=False, bf16=mesh.device_type == "cuda", use_cpu=mesh.device_type == "cpu",
            report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = SequenceSFTTrainer(
            model, config, mesh=mesh, train_dataset=conversations(64), processing_class=make_tokenizer(),
        )  # fmt: skip
        trainer.train()
        dist.barrier()
    mesh.close()


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
