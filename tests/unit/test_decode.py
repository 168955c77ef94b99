"""Tokens depend on prompt and seed only: not on the batch, its order, its memory, or the kind of cache."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import random
from collections import Counter

import pytest
import torch
from families import FAMILIES, family_model
from peft import LoraConfig, get_peft_model
from projections import four_sites
from tiny import tiny_model
from waits import Waits

from spd_dist.errors import DataError
from spd_dist.inference import continuous, drawing
from spd_dist.inference.continuous import ContinuousBatcher
from spd_dist.inference.decode import decode
from spd_dist.inference.kv_cache import SlotCache, num_slot_layers
from spd_dist.inference.requests import Contrast, Decoded, DecodeSettings, Request, half_batch
from spd_dist.inference.sampling import Sampling
from spd_dist.projection.hooks import projected
from spd_dist.types import Projection, ThoughtBudget

ENDS = frozenset(range(2, 64, 9))


def drawn(sampling: Sampling) -> DecodeSettings:
    return DecodeSettings(sampling, ENDS, 0)


GREEDY = Sampling(temperature=0.0, max_new_tokens=12)
SAMPLED = Sampling(temperature=1.0, top_p=0.95, max_new_tokens=12)


def requests(count: int = 20, longest: int = 20, shared: int = 0, samples: int = 1) -> list[Request]:
    rng = random.Random(count)
    beginning = tuple(rng.randrange(3, 64) for _ in range(shared))
    prompts = [beginning + tuple(rng.randrange(3, 64) for _ in range(rng.randrange(1, longest))) for _ in range(count)]
    return [
        Request(f"p{index:02d}", sample, prompt, 1000 * index + sample)
        for index, prompt in enumerate(prompts)
        for sample in range(samples)
    ]


def decoded(model: torch.nn.Module, work: list[Request], sampling: Sampling, **settings: object) -> dict:
    found = list(decode(model, work, drawn(sampling), **settings))
    assert Counter((one.request.id, one.request.sample) for one in found).most_common(1)[0][1] == 1
    return {(one.request.id, one.request.sample): (one.tokens, one.finish_reason) for one in found}


@torch.no_grad()
def by_hand(model: torch.nn.Module, request: Request, num_tokens: int) -> tuple[tuple[int, ...], str]:
    """Greedy, without any cache."""
    tokens = list(request.tokens)
    for _ in range(num_tokens):
        tokens.append(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax().item())
        if tokens[-1] in ENDS:
            break
    made = tuple(tokens[len(request.tokens) :])
    return made, "stop" if made[-1] in ENDS else "length"


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_forward_passes_without_a_cache(family):
    model, work = family_model(family), requests(10)
    found = decoded(model, work, GREEDY, batch_size=4)
    for request in work:
        assert found[request.id, 0] == by_hand(model, request, GREEDY.max_new_tokens)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
@torch.no_grad()
def test_entropy_is_that_of_the_distribution_before_temperature_and_truncation(sampling):
    model = tiny_model()
    work = [dataclasses.replace(one, measures_entropy=index != 1) for index, one in enumerate(requests(6))]
    for one in decode(model, work, drawn(sampling), batch_size=3):
        tokens = torch.tensor([(*one.request.tokens, *one.tokens)])
        logits_TV = model(tokens, use_cache=False).logits[0, len(one.request.tokens) - 1 : -1]
        expected = torch.distributions.Categorical(logits=logits_TV).entropy().mean().item()
        assert one.mean_entropy == (pytest.approx(expected, abs=1e-4) if one.request.measures_entropy else None)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "phi3", "deepseek_v3", "falcon"])
def test_slots_hold_every_cache_of_plain_keys_and_values(family):
    assert num_slot_layers(family_model(family).config, 64)


def test_slots_refuse_what_they_cannot_hold():
    sliding = family_model("mistral").config
    assert num_slot_layers(sliding, max_length=4)
    assert not num_slot_layers(sliding, max_length=5)
    assert not num_slot_layers(family_model("qwen3_next").config, 4)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, Sampling(1.5, 0.8, 20, 0.01, 1.2, 12)])
@pytest.mark.seconds
def test_tokens_are_the_same_at_batch_1_8_and_64(sampling):
    model, work = tiny_model(vocab_size=64), requests(70)
    alone = decoded(model, work, sampling, batch_size=1)
    assert decoded(model, work, sampling, batch_size=8) == alone
    assert decoded(model, random.Random(0).sample(work, len(work)), sampling, batch_size=64) == alone
    assert {reason for _, reason in alone.values()} == {"stop", "length"}


@torch.no_grad()
def contrasted_by_hand(model: torch.nn.Module, hold: Projection, request: Request, beta: float) -> tuple[int, ...]:
    """Greedy from log p + beta (log q - log p), by whole passes without any cache."""
    tokens = list(request.tokens)
    for _ in range(GREEDY.max_new_tokens):
        log_p_V = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].log_softmax(-1)
        with projected(model, hold):
            log_q_V = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].log_softmax(-1)
        tokens.append((log_p_V + beta * (log_q_V - log_p_V)).argmax().item())
        if tokens[-1] in ENDS:
            break
    return tuple(tokens[len(request.tokens) :])


@pytest.mark.seconds
def test_contrasted_tokens_are_those_of_two_policies_by_hand_in_every_batch():
    model, work, hold = tiny_model(vocab_size=64), requests(12, shared=10), four_sites()
    plain = decoded(model, work, GREEDY, batch_size=4)
    with projected(model, hold) as monitor:
        held = decoded(model, work, GREEDY, batch_size=4)
        for beta in (0.0, 1.0, 3.0):
            settings = dataclasses.replace(drawn(GREEDY), contrast=Contrast(beta, monitor.paused))
            found = {one.request.id: one.tokens for one in decode(model, work, settings, batch_size=5)}
            if beta < 3:
                expected = {id: tokens for (id, _), (tokens, _) in (held if beta else plain).items()}
                assert found == expected, "0 is the policy as it is, 1 the projected one"
            else:
                assert found != {id: tokens for (id, _), (tokens, _) in held.items()}
        sampled = dataclasses.replace(drawn(SAMPLED), contrast=Contrast(2.0, monitor.paused))
        batches = [
            {one.request.id: one.tokens for one in decode(model, work, sampled, **options)}
            for options in ({"batch_size": 1}, {"batch_size": 7}, {"batch_size": 3, "fixed_columns": 64})
        ]
        assert batches[0] == batches[1] == batches[2]
    for request in work[:4]:
        assert found[request.id] == contrasted_by_hand(model, hold, request, 3.0)


def test_a_token_that_both_policies_rule_out_stays_ruled_out():
    contrast = Contrast(2.0, contextlib.nullcontext)
    logits_NV = torch.tensor([[1.0, 2.0, -torch.inf]])
    assert contrast.logits(logits_NV, logits_NV.flip(1).roll(-1, 1))[0, 2] == -torch.inf
    torch.testing.assert_close(contrast.logits(logits_NV, logits_NV), logits_NV.log_softmax(-1))


def test_a_contrast_without_two_caches_of_plain_keys_and_values_is_refused():
    model = family_model("qwen3_next")
    settings = dataclasses.replace(drawn(GREEDY), contrast=Contrast(2.0, contextlib.nullcontext))
    with pytest.raises(DataError, match=r"generate\.contrast: 2 needs two caches .*; set generate\.contrast=1"):
        list(decode(model, requests(2), settings))


def test_a_beginning_that_all_prompts_share_is_read_once_and_changes_nothing():
    model, work = tiny_model(vocab_size=64), requests(12, shared=15)
    alone = {key: value for one in work for key, value in decoded(model, [one], SAMPLED).items()}
    read = []
    hook = model.register_forward_pre_hook(
        lambda _, __, inputs: read.append(inputs["input_ids"].shape), with_kwargs=True
    )
    assert decoded(model, work, SAMPLED, batch_size=4) == alone
    hook.remove()
    assert read[0] == (1, 15)
    assert max(columns for _, columns in read[1:]) < 20


def test_several_samples_of_a_prompt_differ_and_read_it_once():
    model, work = tiny_model(vocab_size=64), requests(3, samples=6)
    rows = []
    hook = model.register_forward_pre_hook(
        lambda _, __, inputs: rows.append(inputs["input_ids"].shape), with_kwargs=True
    )
    found = decoded(model, work, SAMPLED, batch_size=2)
    hook.remove()
    assert sum(count for count, columns in rows if columns > 1) == 3
    assert len({tokens for tokens, _ in found.values()}) > 12
    assert found == {key: value for one in work for key, value in decoded(model, [one], SAMPLED).items()}


@torch.no_grad()
def test_in_16_bits_a_cpu_multiplies_the_last_states_of_all_prompts_at_once():
    model = family_model("llama").bfloat16()
    seen: list[torch.Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    decoded(model, requests(), GREEDY)
    assert max(len(one) for one in seen) > 1
    assert all(one.shape[1] == 1 and one.is_contiguous() for one in seen)


def test_fixed_shapes_make_bfloat16_independent_of_what_shares_the_batch():
    model, work = tiny_model(vocab_size=64, num_hidden_layers=2).bfloat16(), requests(24)
    shapes = set()
    hook = model.register_forward_pre_hook(
        lambda _, __, inputs: shapes.add(inputs["input_ids"].shape), with_kwargs=True
    )
    fixed = {"batch_size": 6, "fixed_columns": 40}
    whole = decoded(model, work, SAMPLED, **fixed)
    hook.remove()
    assert {rows for rows, columns in shapes if columns == 1} <= {1, 6}
    parts = [decoded(model, work[start::3], SAMPLED, **fixed) for start in range(3)]
    assert whole == parts[0] | parts[1] | parts[2]


def test_rows_one_at_a_time_have_the_logits_of_plain_peft_in_bfloat16_bit_by_bit():
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = tiny_model(vocab_size=64, num_hidden_layers=4).bfloat16()
    adapted, work, made = get_peft_model(model, lora, autocast_adapter_dtype=False).eval(), requests(12, shared=9), []
    model.get_output_embeddings().register_forward_hook(lambda *parts: made.append(parts[-1][0, -1]))
    found = decoded(model, work, GREEDY, batch_size=1, fixed_columns=40)
    ours, theirs = made.copy(), {}
    made.clear()
    for one in sorted(work, key=lambda one: (-len(one.tokens), one.id)):
        prompt = torch.tensor([one.tokens])
        ends = {"max_new_tokens": GREEDY.max_new_tokens, "eos_token_id": sorted(ENDS), "pad_token_id": 0}
        answer = adapted.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **ends)
        theirs[one.id, 0] = tuple(answer[0, len(one.tokens) :].tolist())
    assert {key: tokens for key, (tokens, _) in found.items()} == theirs
    assert torch.equal(torch.stack(ours), torch.stack(made))


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_fixed_shapes_beyond_a_sliding_window_change_no_token_and_depend_on_no_share(family):
    model, brief = family_model(family), dataclasses.replace(GREEDY, max_new_tokens=2)
    work = [dataclasses.replace(one, tokens=one.tokens[:2]) for one in requests(6)]  # none outgrows the window of 4
    longer = [*work, Request("long", 0, tuple(range(5, 25)), 0)]
    for share in (work, work[::2], longer):
        found = decoded(model, share, brief, batch_size=4, fixed_columns=22)
        assert found == {(one.id, 0): by_hand(model, one, 2) for one in share}


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_out_of_memory_halves_the_batch_and_keeps_the_samples(family, caplog):
    model, work = family_model(family), requests(12)
    expected = decoded(model, work, SAMPLED, batch_size=2)

    def full(_, __, inputs):
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = model.register_forward_pre_hook(full, with_kwargs=True)
    assert decoded(model, work, SAMPLED, batch_size=8) == expected
    assert "generate.batch_size=2" in caplog.text
    hook.remove()


@pytest.mark.parametrize("num_tensors", [0, 3])
def test_a_cache_that_finds_no_room_halves_the_batch_and_loses_no_request(caplog, monkeypatch, num_tensors):
    model, work = tiny_model(vocab_size=64), requests(20)
    expected = decoded(model, work, SAMPLED, batch_size=4)
    room, made = SlotCache._room, []

    def full(cache, like):
        made.append(cache.num_slots)
        if cache.num_slots > 5 and len(made) > num_tensors:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return room(cache, like)

    monkeypatch.setattr(SlotCache, "_room", full)
    assert decoded(model, work, SAMPLED, batch_size=20) == expected
    assert "generate.batch_size=5" in caplog.text


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "phi3", "falcon"])
def test_a_pass_waits_for_the_device_once_and_takes_no_memory_for_keys_and_values(family, monkeypatch):
    model, work = family_model(family), requests(8)
    work = [dataclasses.replace(one, measures_entropy=True, budget=ThoughtBudget(3, 7, 8)) for one in work]
    sampling = Sampling(0.7, 0.9, repetition_penalty=1.1, max_new_tokens=12)
    step, found, kept = ContinuousBatcher._step, [], set()

    def counted(loop):
        with Waits() as waits:
            yield from step(loop)
        found.append(waits.found)
        kept.add(tuple(tensor.data_ptr() for layer in loop.caches[0].slots for tensor in (layer.keys, layer.values)))

    monkeypatch.setattr(ContinuousBatcher, "_step", counted)
    endless = DecodeSettings(sampling, frozenset(), 0)
    assert len(list(decode(model, work, endless, batch_size=4))) == 8
    assert len(found) >= 22
    assert all(waits == ["tolist"] for waits in found)
    assert len(kept) == 1


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, Sampling(1.5, 0.8, 20, 0.01, 1.2, 12), Sampling(2.0, 0.999)])
@pytest.mark.parametrize("fixed", [None, 300])
@pytest.mark.seconds
def test_tokens_that_are_read_a_pass_late_are_the_same(sampling, fixed, monkeypatch):
    model, work = tiny_model(vocab_size=259), requests(14, samples=2)
    expected = decoded(model, work, sampling, batch_size=5, fixed_columns=fixed)
    monkeypatch.setattr(drawing, "READ_LATE", {"cpu"})
    assert decoded(model, work, sampling, batch_size=5, fixed_columns=fixed) == expected


@pytest.mark.parametrize("shared", [0, 40])
def test_a_long_prompt_is_read_in_several_passes_between_which_the_other_rows_go_on(shared, monkeypatch):
    model, work = tiny_model(vocab_size=64), requests(8, longest=60, shared=shared)
    work = [dataclasses.replace(work[0], id="short", tokens=work[0].tokens[: shared + 3]), *work]
    endless = dataclasses.replace(SAMPLED, max_new_tokens=30)
    expected = decoded(model, work, endless, batch_size=3)
    monkeypatch.setattr(continuous, "MAX_PREFILL_TOKENS", 16)
    read = []
    hook = model.register_forward_pre_hook(
        lambda _, __, inputs: read.append(inputs["input_ids"].shape), with_kwargs=True
    )
    assert decoded(model, work, endless, batch_size=3) == expected
    hook.remove()
    assert max(math.prod(shape) for shape in read) <= 16
    long = [index for index, (_, columns) in enumerate(read) if columns == 16]
    assert any(read[index + 1][1] == 1 and read[index + 2][1] > 1 for index in long)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sampling", [GREEDY, dataclasses.replace(SAMPLED, top_p=0.5)])
def test_a_gpu_decodes_what_a_cpu_decodes_and_no_pass_waits_for_it(sampling, monkeypatch):
    """But for the event behind the tokens of the pass before, which is no synchronising call."""
    model, work = tiny_model(vocab_size=64), requests(20)
    expected = decoded(model, work, sampling, batch_size=6)
    step = ContinuousBatcher._step

    def unwaited(loop):
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield from step(loop)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(ContinuousBatcher, "_step", unwaited)
    assert decoded(model.cuda(), work, sampling, batch_size=6) == expected


@pytest.mark.parametrize(
    "message",
    [
        "DefaultCPUAllocator: can't allocate memory",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_out_of_memory_that_no_smaller_batch_can_cure_says_what_to_do(message):
    model = tiny_model(vocab_size=64)

    def full(*_):
        raise RuntimeError(message)

    hook = model.register_forward_pre_hook(full)
    with pytest.raises(DataError, match=r"generate.batch_size=1; lower .*, or shard .*generate.placement=layerwise"):
        decoded(model, requests(3), SAMPLED, batch_size=4)
    with pytest.raises(
        DataError, match=r"generate.batch_size=4; ranks in step .* lower generate.batch_size"
    ) as failure:
        decoded(model, requests(3), SAMPLED, batch_size=4, smaller=functools.partial(half_batch, in_step=True))
    assert "placement" not in str(failure.value)
    with pytest.raises(DataError, match=r"generate.batch_invariant=true .* lower generate.batch_size in a run_dir of"):
        decoded(model, requests(3), SAMPLED, batch_size=4, fixed_columns=40)
    with pytest.raises(DataError, match=r"evaluate.batch_size=1; lower evaluate.max_new_tokens .*evaluate.placement="):
        decoded(model, requests(3), SAMPLED, batch_size=4, smaller=functools.partial(half_batch, section="evaluate"))
    hook.remove()


def test_other_errors_of_the_model_are_not_taken_for_memory():
    model = tiny_model(vocab_size=64)

    def broken(*_):
        raise RuntimeError("shape mismatch")

    model.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        decoded(model, requests(3), SAMPLED)


def test_a_prompt_longer_than_the_context_is_named():
    with pytest.raises(DataError, match=r"prompt 'long' has 120 tokens, .* takes 132, and the model's context is 128"):
        decoded(tiny_model(max_position_embeddings=128), [Request("long", 0, (5,) * 120, 0)], SAMPLED)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_nothing_is_inherited_from_the_generation_config_of_the_model(family):
    model, work = family_model(family), requests(6)
    expected = decoded(model, work, GREEDY)
    inherited = model.generation_config
    inherited.update(
        repetition_penalty=3.0, no_repeat_ngram_size=1, suppress_tokens=[5, 6, 7], max_length=22, do_sample=True
    )
    assert decoded(model, work, GREEDY) == expected
    assert model.generation_config is inherited


def test_no_requests_give_no_completions():
    assert list(decode(tiny_model(), [], drawn(SAMPLED))) == []


def test_completions_come_as_they_finish():
    model = tiny_model(vocab_size=64)
    first: Decoded = next(iter(decode(model, requests(30), drawn(SAMPLED), batch_size=4)))
    assert first.tokens
