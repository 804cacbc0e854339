"""Parts that the examples share: arguments, a model small enough for a laptop, and a few rated sentences."""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from exo_fast.layout import Group

RATED = {  # prompt -> candidates with their rewards
    "The film was": {" a joy from start to end.": 1.0, " fine, if a little long.": 0.3, " two wasted hours.": -1.0},
    "I found the acting": {" superb.": 1.0, " uneven, but honest.": 0.2, " wooden, and the plot worse.": -0.9},
    "In the end": {" we all stood and clapped.": 0.9, " it works.": 0.4, " nobody cared.": -0.8},
    "The music": {" carries every scene.": 0.8, " is pleasant enough.": 0.3, " never stops, alas.": -0.7},
}


def arguments(description):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or path of a causal LM (default: a tiny random Llama that reads bytes)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning_rate", type=float, help="default 1e-5, and 1e-3 for the tiny model")
    args = parser.parse_args()
    args.learning_rate = args.learning_rate or (1e-5 if args.model else 1e-3)
    return args


def load(name):
    """Return (model, encode): a causal LM in float32, and a function from a text to its token ids."""
    torch.manual_seed(0)
    if name is None:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)), lambda text: list(text.encode())
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return model, lambda text: tokenizer.encode(text, add_special_tokens=False)


def rated_groups(encode):
    """[Group] and their rewards (G, K)."""
    groups = [Group(encode(prompt), [encode(text) for text in candidates]) for prompt, candidates in RATED.items()]
    return groups, torch.tensor([list(candidates.values()) for candidates in RATED.values()])
