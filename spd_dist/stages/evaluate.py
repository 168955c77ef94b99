"""Answers of one arm to the held-out examples, greedy or sampled, judged by the task."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from spd_dist.analysis.answer_summary import AnswersSummary, answers_summary
from spd_dist.config import Evaluate, Generate, planned_rows
from spd_dist.data.batches import Division, micro_batches, pad
from spd_dist.data.prompts import TestSet, choice_texts, judged_text
from spd_dist.data.scoring.programs import canonical
from spd_dist.data.tasks import Row, judging_code
from spd_dist.data.thinking import thought_budget
from spd_dist.distributed.collectives import gather_objects, together
from spd_dist.distributed.uneven_work import on_main
from spd_dist.errors import DataError
from spd_dist.inference.decode import check_context
from spd_dist.inference.engine_table import EngineWork
from spd_dist.inference.external.vllm_engine import share_of_work
from spd_dist.inference.hf_engines import held_to
from spd_dist.inference.open_engine import open_engine
from spd_dist.inference.placement import choose_placement, placed
from spd_dist.inference.requests import Decoded, Request
from spd_dist.inference.routing import NUM_READ, route_counts, router_summary, routers
from spd_dist.inference.sampling import Sampling
from spd_dist.models.loss import example_losses
from spd_dist.models.policy import Policy
from spd_dist.seeding import row_seed
from spd_dist.stages.context import StageContext
from spd_dist.storage.answers import answers_path, router_path
from spd_dist.storage.artifacts import JsonlWriter
from spd_dist.storage.completions import is_repetitive
from spd_dist.storage.keyed_parts import Key, merge_parts, part_path, read_parts
from spd_dist.storage.records import write_record
from spd_dist.types import Answer, Projection, Prompt, SupervisedExample


def evaluate_arm(
    policy: Policy,
    test_set: TestSet,
    config: Evaluate,
    context: StageContext,
    *,
    arm: str,
    projection: Projection | None = None,
) -> AnswersSummary:
    """Write `ARM/TASK.jsonl` in the stage's folder, a line an answer in the order of the test set; give its summary.

    A collective. The file is the same at every world size, and lines that an earlier attempt left are kept. Every rank
    has the whole test set. The policy is held to `projection` while it answers, if the arm is the projected policy
    itself.

    Raises:
        StopRequested: after an answer, on the ranks that were asked; what is written stays.
        DataError: no examples, a prompt that is too long, logits that are NaN, memory or disk is full.
        ConfigError: a task that runs code without leave.
    """
    if not test_set.rows:
        raise DataError(f"{test_set.task.name}: the test set is empty; set data.test, or raise data.num_test")
    merged = answers_path(context.folder, arm, test_set.task.name)
    answering = _Answering(policy, test_set, config, context, projection, merged, arm)
    todo = _todo(answering)
    if todo is not None and answering.decoding.engine in ("hf", "hf_cb"):
        _write_routers(answering)
    if todo is not None and test_set.choices:
        _choose(answering, todo)
    elif todo is not None:
        _answer(answering, todo, _likelihoods(answering, test_set.examples))
    return on_main("merging the answers", lambda: _merge(answering))


@dataclass(frozen=True)
class _Answering:
    """One arm at work on one test set."""

    policy: Policy
    test_set: TestSet
    config: Evaluate
    context: StageContext
    projection: Projection | None
    merged: Path
    arm: str

    def keys(self) -> list[Key]:
        """Example id and sample of every answer, in the order of the merged file."""
        return [(prompt.id, sample) for prompt in self.test_set.prompts for sample in range(self.config.num_samples)]

    @property
    def decoding(self) -> Generate:
        """The engine's settings."""
        return self.config.decoding(self.context.generate)

    @property
    def longest(self) -> Prompt:
        """The longest prompt."""
        return max(self.test_set.prompts, key=lambda prompt: len(prompt.tokens))

    @contextmanager
    def read_in_process(self) -> Generator[None]:
        """The policy's own model, placed, to read reference answers: the body holds no collective."""
        settings, world = self.decoding, self.context.world
        with together("looking at the longest prompt"):
            check_context(self.policy.model, self.longest, settings.max_new_tokens, section="evaluate")
        max_length = len(self.longest.tokens) + settings.max_new_tokens
        placement = choose_placement(self.policy, settings, world, max_length, section="evaluate")
        held = held_to(self.policy, self.projection, settings.apply_as)
        with held, placed(self.policy, placement, world, "answering"):
            yield

    def engine_work(self, todo: Sequence[Request]) -> EngineWork:
        """What an engine is opened for."""
        longest = Request(self.longest.id, 0, self.longest.tokens, 0)
        scratch = self.merged.parent / "engine"
        return EngineWork(todo, longest, scratch, "evaluate", self.arm, self.context.engines)


def _todo(answering: _Answering) -> list[Request] | None:
    """This rank's share of what is not answered yet, longest first; None if nothing is left to do on any rank."""
    keys, world, seed = answering.keys(), answering.context.world, answering.test_set.seed

    def missing() -> list[Key]:
        done = read_parts(answering.merged, Answer)
        return [key for key in keys if key not in done]

    left = on_main("reading what was answered before", missing)
    if not left:
        return None
    tokens = {prompt.id: prompt.tokens for prompt in answering.test_set.prompts}
    number, count = share_of_work(answering.decoding, answering.decoding.engine, world)
    own = [] if number is None else sorted(left, key=lambda key: -len(tokens[key[0]]))[number::count]
    skipped = (len(keys) - len(left)) // count
    answering.context.begin(len(own) + skipped, skipped)
    key, marks = "evaluate.max_thought_tokens", answering.test_set.thinking_marks
    budget = thought_budget(answering.policy.tokenizer, answering.config.max_thought_tokens, marks, key)
    return [
        Request(name, sample, tokens[name], row_seed(seed, name, sample), budget, measures_entropy=True)
        for name, sample in own
    ]


def _write_routers(answering: _Answering) -> None:
    """Of a mixture of experts, write how its routers spread the first prompts, unless that is there; a collective."""
    path, model, world = router_path(answering.merged), answering.policy.model, answering.context.world
    if routers(model) and not on_main("looking for what routers chose", path.exists):
        prompts = [prompt.tokens for prompt in answering.test_set.prompts[:NUM_READ]]
        with answering.read_in_process():
            counts = route_counts(model, prompts[world.rank :: world.size])
        everyones = [counts] if world.size == 1 else gather_objects(counts)
        on_main("writing what routers chose", lambda: write_record(path, router_summary(everyones)))


@torch.no_grad()
def _likelihoods(answering: _Answering, examples: Sequence[SupervisedExample]) -> dict[str, float]:
    """Mean negative log-likelihood of every example's answer, by id; the batches are the same at every world size."""
    if not examples:
        return {}
    policy, world, found = answering.policy, answering.context.world, {}
    device = next(policy.model.parameters()).device
    whole = micro_batches(examples, Division(1, planned_rows(answering.config.batch_size)))
    with answering.read_in_process():
        for micro_batch in list(whole)[world.rank :: world.size]:
            batch = pad(micro_batch.examples, policy.pad_token_id, device)
            loss_B = example_losses(policy.model, batch.tokens_BT, batch.attention_BT, batch.target_BT)
            found |= {one.id: loss for one, loss in zip(micro_batch.examples, loss_B.tolist(), strict=True)}
            answering.context.stop_alone()
    everyones = [found] if world.size == 1 else gather_objects(found)
    return {key: loss for ranks in everyones for key, loss in ranks.items()}


def _answer(answering: _Answering, todo: Sequence[Request], likelihoods: Mapping[str, float]) -> None:
    """Append this rank's answers to its part as they finish."""
    policy, test_set, context = answering.policy, answering.test_set, answering.context
    config = answering.config
    sampling = Sampling(config.temperature, config.top_p, config.top_k, config.min_p, 1.0, config.max_new_tokens)
    rows = {row["id"]: row for row in test_set.rows}

    def judge(decoded: Decoded) -> Answer:
        key = decoded.request.id
        return _judged(decoded, policy, test_set, rows[key], likelihoods.get(key))

    work = answering.engine_work(todo)
    with open_engine(policy, answering.projection, answering.decoding, context.world, work) as opened:
        if not todo:
            return
        with JsonlWriter(part_path(answering.merged, context.world.rank, context.world.size)) as part:
            for answer in _beside(judge, opened.engine.complete(todo, sampling)):
                part.write(vars(answer))
                context.advance(1, answer.num_tokens)
                context.stop_alone()


def _choose(answering: _Answering, todo: Sequence[Request]) -> None:
    """Answer by the likeliest choice: nothing is written. Lenient: per byte (acc_norm); strict: as it is (acc)."""
    test_set, context = answering.test_set, answering.context
    losses = _likelihoods(answering, [one for choices in test_set.choices.values() for one in choices])
    rows = {row["id"]: row for row in test_set.rows}
    with JsonlWriter(part_path(answering.merged, context.world.rank, context.world.size)) as part:
        for request in todo:
            row = rows[request.id]
            examples, texts = test_set.choices[request.id], choice_texts(test_set.task, row)
            totals = [losses[one.id] * len(one.targets) for one in examples]
            likeliest = min(range(len(texts)), key=totals.__getitem__)
            per_byte = min(range(len(texts)), key=lambda index: totals[index] / len(texts[index].encode()))
            part.write(vars(_chosen(request, texts, likeliest, per_byte, losses[examples[0].id])))
            context.advance(1, 0)
            context.stop_alone()


def _chosen(request: Request, texts: Sequence[str], likeliest: int, per_byte: int, nll: float) -> Answer:
    return Answer(
        id=request.id,
        output=texts[per_byte],
        extracted=texts[per_byte],
        gold=texts[0],
        correct=per_byte == 0,
        finish_reason="stop",
        num_tokens=0,
        strict=texts[likeliest],
        lenient=texts[per_byte],
        strict_correct=likeliest == 0,
        lenient_correct=per_byte == 0,
        is_repetitive=False,
        nll=nll,
        sample=request.sample,
        reason="right" if per_byte == 0 else "other value",
        vote=texts[per_byte],
        judged_by=judging_code(),
    )


def _beside(judge: Callable[[Decoded], Answer], decoded: Iterator[Decoded]) -> Iterator[Answer]:
    """Answers in the order of `decoded`. They are judged beside the decoding: running a program takes seconds."""
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        waiting: deque[Future[Answer]] = deque()
        for one in decoded:
            waiting.append(pool.submit(judge, one))
            while waiting and waiting[0].done():
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _judged(decoded: Decoded, policy: Policy, test_set: TestSet, row: Row, nll: float | None) -> Answer:
    output = str(policy.tokenizer.decode(list(decoded.tokens), skip_special_tokens=True))
    spoken = judged_text(policy.tokenizer, decoded.request.tokens, decoded.tokens, test_set.thinking_marks)
    request, score = decoded.request, test_set.task.score(row, spoken)
    return Answer(
        id=request.id,
        output=output,
        extracted=score.extracted,
        gold=score.gold,
        correct=score.correct,
        finish_reason=decoded.finish_reason,
        num_tokens=len(decoded.tokens),
        strict=score.strict,
        lenient=score.lenient,
        strict_correct=score.strict_correct,
        lenient_correct=score.lenient_correct,
        is_repetitive=is_repetitive(decoded.tokens),
        nll=nll,
        sample=request.sample,
        reason=score.reason,
        vote=None if score.extracted is None else canonical(score.extracted),
        # in hundredths: what lies below depends on the batch, and the file is the same at every world size
        entropy=None if decoded.mean_entropy is None else round(decoded.mean_entropy, 2),
        judged_by=judging_code(),
    )


def _merge(answering: _Answering) -> AnswersSummary:
    """Write the merged file, unless it is there; give the arm's summary."""
    test_set = answering.test_set
    expected = f"{answering.config.num_samples} answers to each of {len(test_set.prompts)} examples"
    answers = merge_parts(answering.merged, Answer, answering.keys(), expected)
    return answers_summary(answers, test_set.task.metric)
