"""The chunked loss is the model's own, with its gradients, and packed sequences do not see each other."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from families import family_model
from tiny import tiny_model
from torch.nn.functional import cross_entropy, linear
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config

from spd_dist.models import chunked_loss
from spd_dist.models.chunked_loss import LinearCrossEntropy, Tail
from spd_dist.models.loss import Student, check_tail_


@pytest.mark.parametrize(("cap", "scale"), [(0.0, 1.0), (0.0, 0.25), (3.0, 1.0), (3.0, 2.0)])
@pytest.mark.parametrize("chunk_rows", [1, 5, 1000])
def test_loss_and_gradients_are_those_of_cross_entropy(monkeypatch, cap, scale, chunk_rows):
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", {"cpu": 4 * 23 * chunk_rows})
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=draw, requires_grad=True) for shape in [(12, 7), (23, 7), (23,)]
    )
    labels = torch.randint(23, (12,), generator=draw)
    logits = linear(hidden, weight, bias) * scale
    logits = cap * torch.tanh(logits / cap) if cap else logits
    expected = cross_entropy(logits, labels, reduction="none")
    expected_grads = torch.autograd.grad(3 * expected.sum(), [hidden, weight, bias])
    total, loss_N = LinearCrossEntropy.apply(hidden, labels, weight, bias, Tail(cap, scale))
    torch.testing.assert_close(loss_N, expected.detach())
    torch.testing.assert_close(total, expected.sum())
    for found, reference in zip(torch.autograd.grad(3 * total, [hidden, weight, bias]), expected_grads, strict=True):
        torch.testing.assert_close(found, reference, atol=1e-5, rtol=1e-5)


def divergence_of(p: torch.Tensor, q: torch.Tensor, kind: str) -> torch.Tensor:
    """By its definition, from probabilities."""
    middle = (p + q) / 2
    terms = {
        "forward": [(1, p, q)],
        "reverse": [(1, q, p)],
        "js": [(0.5, p, middle), (0.5, q, middle)],
    }
    return sum(share * (one * (one / other).log()).sum(-1) for share, one, other in terms[kind])


@pytest.mark.parametrize(("cap", "scale"), [(0.0, 1.0), (3.0, 2.0)])
@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
@pytest.mark.parametrize("chunk_rows", [1, 5, 1000])
def test_loss_and_gradients_are_those_of_the_divergence_from_a_teacher(monkeypatch, cap, scale, chunk_rows, kind):
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", {"cpu": 4 * 23 * chunk_rows})
    draw = torch.Generator().manual_seed(0)
    hidden, bias = (torch.randn(shape, generator=draw, requires_grad=True) for shape in [(12, 7), (23,)])
    weight, taught = (torch.randn(shape, generator=draw) for shape in [(23, 7), (12, 7)])

    def log_probabilities(states: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        logits = linear(states.double(), weight.double(), bias.double()) * scale
        return (cap * torch.tanh(logits / cap) if cap else logits).log_softmax(1)

    target = log_probabilities(taught, bias.detach())
    expected = divergence_of(target.exp(), log_probabilities(hidden, bias).exp(), kind)
    expected_grads = torch.autograd.grad(3 * expected.sum(), [hidden, bias])
    total, loss_N = LinearCrossEntropy.apply(hidden, taught, weight, bias, Tail(cap, scale, kind))
    torch.testing.assert_close(loss_N, expected.detach().float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(total, expected.sum().float(), atol=1e-5, rtol=1e-5)
    for found, reference in zip(torch.autograd.grad(3 * total, [hidden, bias]), expected_grads, strict=True):
        torch.testing.assert_close(found, reference, atol=5e-5, rtol=1e-5)
    own, _ = LinearCrossEntropy.apply(taught, taught, weight, bias, Tail(cap, scale, kind))
    assert own.abs() < 1e-5, "a student that is its teacher has nothing to learn"


def test_a_frozen_head_gets_no_gradient_and_no_memory():
    hidden = torch.randn(6, 4, requires_grad=True)
    weight = torch.randn(9, 4)
    total, _ = LinearCrossEntropy.apply(hidden, torch.arange(6), weight, None, Tail())
    held = [None if tensor is None else tuple(tensor.shape) for tensor in total.grad_fn.saved_tensors]
    assert held == [(6, 4), None, None]
    total.backward()
    assert weight.grad is None


def supervised(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    flat = torch.arange(tokens.numel()).view_as(tokens)
    return {"token_BT": tokens, "source_N": flat[:, :-1].flatten(), "label_N": tokens[:, 1:].flatten()}


SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    gemma = Gemma2Config(**SMALL, final_logit_softcapping=1.5, query_pre_attn_scalar=8)
    cohere = CohereConfig(**SMALL, logit_scale=0.25)
    made = {
        name: AutoModelForCausalLM.from_config(config).eval() for name, config in [("gemma", gemma), ("cohere", cohere)]
    }
    return made | {"llama": tiny_model(vocab_size=64), "untied": tiny_model(vocab_size=64, tie_word_embeddings=False)}


@pytest.mark.parametrize("name", ["llama", "untied", "gemma", "cohere"])
def test_the_student_has_the_loss_and_gradients_of_the_model(name):
    model = models()[name]
    tokens = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(1))
    expected = model(input_ids=tokens, labels=tokens).loss * 20
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    student = Student(model)
    assert check_tail_(student, tokens[:1])
    total, loss_N = student(**supervised(tokens))
    total.backward()
    assert loss_N.shape == (20,)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    for parameter_name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[parameter_name], rtol=1e-4, atol=1e-4)
    assert "forward" not in vars(model.get_output_embeddings()), "the head is left as it was"


@contextlib.contextmanager
def with_turned_states(model: torch.nn.Module) -> Iterator[None]:
    """The model with its last states turned round."""
    handle = model.model.norm.register_forward_hook(lambda _module, _inputs, states: -states)
    yield
    handle.remove()


@pytest.mark.parametrize("name", ["llama", "gemma"])
@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
@pytest.mark.parametrize("holds_logits", [False, True])
def test_without_labels_the_student_learns_what_its_teacher_would_say(name, holds_logits, kind):
    model = models()[name].train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    tokens = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(1))
    student = Student(model, lambda: with_turned_states(model), divergence=kind)
    student.tail = None if holds_logits else student.tail
    inputs = supervised(tokens) | {"label_N": None}
    with torch.no_grad():
        model.eval()
        own = model(tokens).logits[:, :-1].log_softmax(-1)
        with with_turned_states(model):
            taught = model(tokens).logits[:, :-1].log_softmax(-1)
    expected = divergence_of(taught.exp(), own.exp(), kind).flatten()
    assert expected.mean() > 1e-3
    _, loss_N = student(**inputs)
    torch.testing.assert_close(loss_N, expected, atol=1e-5, rtol=1e-5)
    torch.manual_seed(7)
    model.train()
    before = torch.random.get_rng_state()
    student._taught({"input_ids": tokens, "use_cache": False}, inputs["source_N"])
    assert torch.equal(torch.random.get_rng_state(), before), "the teacher has no dropout"
    assert model.training
    assert all(module.training for module in model.modules())
    total, _ = student(**inputs)
    total.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_a_model_that_changes_its_logits_in_its_own_way_is_found_and_still_exact():
    model = tiny_model()
    head = model.get_output_embeddings()
    tokens = torch.arange(3, 40)[None]
    student = Student(model)
    inner = model.forward

    def tempered(*args: object, **kwargs: object) -> object:
        output = inner(*args, **kwargs)
        output.logits = output.logits / 3
        return output

    model.forward = tempered
    assert student.tail is not None
    assert not check_tail_(student, tokens)
    assert student.tail is None
    total, _ = student(**supervised(tokens))
    expected = cross_entropy(
        linear(model.model(tokens).last_hidden_state[0, :-1], head.weight) / 3, tokens[0, 1:], reduction="sum"
    )
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3"])
def test_sequences_in_one_row_do_not_see_each_other(family, attention):
    model = family_model(family)
    model.set_attn_implementation(attention)
    student = Student(model)
    first, second = torch.arange(5, 20)[None], torch.arange(30, 60)[None]
    alone = [student(**supervised(tokens))[1] for tokens in (first, second)]
    packed = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(15), torch.arange(30)])[None]
    source = torch.cat([torch.arange(14), torch.arange(15, 44)])
    _, loss_N = student(packed, source, packed[0][source + 1], {"position_ids": positions})
    assert model.config._attn_implementation == attention
    torch.testing.assert_close(loss_N, torch.cat(alone), atol=2e-6, rtol=1e-6)
