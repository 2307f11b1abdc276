"""Makes the golden bundles of this stageline's version: `python tests/golden/make.py`. Those of older versions stay.

The checkpoints are the same for every version, and so is what transformers computes from them (expected.json).
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from stageline.exporter.export import export
from stageline.runtime.bundle.manifest import UncutManifest

HERE = Path(__file__).parent
VERSION = UncutManifest.model_fields["version"].default
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "sat", "ran", "on", "mats")
SIZES = {
    "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "num_hidden_layers": 2,
    "vocab_size": len(WORDS), "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "classifier": ("bert", "BertForSequenceClassification", {"type_vocab_size": 2}),
    "generator": ("llama", "LlamaForCausalLM", {"num_key_value_heads": 1, "bos_token_id": 2, "eos_token_id": None}),
}


def checkpoint(folder: Path, model_type: str, name: str, values: dict[str, Any]) -> Any:
    """A checkpoint and its model, with weights so large that every token matters."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    config = transformers.AutoConfig.for_model(model_type, **SIZES, **values)
    torch.manual_seed(7)
    model = getattr(transformers, name)._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return model


@torch.no_grad()
def expected(classifier: Any, generator: Any) -> dict[str, Any]:
    """Inputs, and what transformers makes of them with eager attention in float32."""
    rng = np.random.default_rng(3)
    ids, mask = rng.integers(5, len(WORDS), (3, 9)), (np.arange(9) < np.array([[9], [4], [1]])).astype(np.int64)
    inputs = {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": rng.integers(0, 2, ids.shape)}
    logits = classifier(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits
    prompt = torch.tensor([[5, 6, 8, 10, 5, 11, 7]])
    text = generator.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12)
    scores = generator(text).logits[0].log_softmax(-1)
    at = torch.arange(prompt.shape[1] - 1, text.shape[1] - 1)
    return {
        "classifier": {"inputs": {k: v.tolist() for k, v in inputs.items()}, "logits": logits.tolist()},
        "generator": {
            "prompt": prompt[0].tolist(),
            "tokens": text[0, prompt.shape[1] :].tolist(),
            "logprobs": scores[at, text[0, at + 1]].tolist(),
        },
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        models = {name: checkpoint(Path(made, name), *model) for name, model in MODELS.items()}
        (HERE / "expected.json").write_text(json.dumps(expected(**models)) + "\n")
        for name in MODELS:
            target = HERE / f"v{VERSION}" / name
            shutil.rmtree(target, ignore_errors=True)
            export(Path(made, name), target, stages=2)
