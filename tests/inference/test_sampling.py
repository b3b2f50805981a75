from __future__ import annotations

import collections

import numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.inference.sampling import Chooser, Chosen, Sampling, choose_all

VOCABULARY = 40
SEEDS = st.integers(0, 10_000)


def logits(seed: int, rows: int = 1, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * scale


def say(sampling: Sampling, steps_T_V: torch.Tensor) -> list[Chosen]:
    chooser = Chooser(sampling)
    return [choose_all([chooser], row[None])[0] for row in steps_T_V]


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_greedy_takes_the_likeliest_token(seed: int) -> None:
    rows = logits(seed, 5)
    assert [chosen.token for chosen in say(Sampling(5), rows)] == rows.argmax(-1).tolist()


@given(SEEDS, st.floats(-2, 2), st.floats(-2, 2), st.floats(-5, 5))
@settings(max_examples=60, deadline=None)
def test_penalties_and_bias_are_openais_formula(
    seed: int, presence: float, frequency: float, bias: float
) -> None:
    rows = logits(seed, 12, scale=1.0)
    sampling = Sampling(
        12, presence_penalty=presence, frequency_penalty=frequency, logit_bias=((3, bias), (7, -bias))
    )
    counts: collections.Counter[int] = collections.Counter()
    for chosen, row in zip(say(sampling, rows), rows, strict=True):
        mu = row.numpy().astype(numpy.float64)
        mu[3] += bias
        mu[7] -= bias
        for token in range(VOCABULARY):
            mu[token] -= counts[token] * frequency + (counts[token] > 0) * presence
        best = numpy.sort(mu)[-2:]
        if best[1] - best[0] > 1e-4:
            assert chosen.token == int(mu.argmax())
        counts[chosen.token] += 1


@given(SEEDS, st.floats(0.05, 1.0), st.integers(0, VOCABULARY + 2), st.floats(0.2, 2.0))
@settings(max_examples=80, deadline=None)
def test_a_sampled_token_is_in_the_top_k_and_in_their_nucleus(
    seed: int, top_p: float, top_k: int, temperature: float
) -> None:
    row = logits(seed)
    chosen = say(Sampling(1, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed), row)[0]
    p = numpy.exp(row[0].numpy().astype(numpy.float64) / temperature)
    order = numpy.argsort(-p, kind="stable")[: top_k or None]
    kept = p[order] / p[order].sum()
    before = numpy.cumsum(kept) - kept
    assert chosen.token in order[before < top_p + 1e-6]


def test_a_thousand_draws_follow_the_distribution() -> None:
    row = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    chooser = Chooser(Sampling(1, temperature=1.0, seed=3))
    drawn = collections.Counter(choose_all([chooser], row)[0].token for _ in range(4000))
    expected = torch.softmax(row[0], -1) * 4000
    chi_square = sum((drawn[n] - float(expected[n])) ** 2 / float(expected[n]) for n in range(4))
    assert chi_square < 16.27  # p = 0.001 at 3 degrees of freedom


@given(SEEDS, st.integers(1, 5), st.data())
@settings(max_examples=40, deadline=None)
def test_an_answer_does_not_depend_on_who_shares_the_batch(
    seed: int, others: int, data: st.DataObject
) -> None:
    def sampling(n: int) -> Sampling:
        draw = data.draw(st.sampled_from(["greedy", "sampled", "penalised", "told"]), label=f"row {n}")
        return {
            "greedy": Sampling(6),
            "sampled": Sampling(6, temperature=1.3, top_p=0.9, top_k=20, seed=seed + n),
            "penalised": Sampling(6, temperature=0.8, presence_penalty=0.5, frequency_penalty=0.3, seed=n),
            "told": Sampling(6, logprobs=5),
        }[draw]

    hows = [sampling(n) for n in range(others + 1)]
    steps = torch.stack([logits(seed + 100 * n, 6) for n in range(others + 1)], dim=1)
    choosers = [Chooser(how) for how in hows]
    together = [choose_all(choosers, step) for step in steps]
    for n, how in enumerate(hows):
        assert [step[n] for step in together] == say(how, steps[:, n])


@given(SEEDS, st.integers(0, 20), st.floats(0, 2))
@settings(max_examples=40, deadline=None)
def test_log_probabilities_are_those_of_the_models_own_logits(
    seed: int, top: int, temperature: float
) -> None:
    row = logits(seed)
    sampling = Sampling(1, temperature=temperature, seed=1, logprobs=top, logit_bias=((2, 50.0),))
    chosen = say(sampling, row)[0]
    expected = row[0].double() - row[0].double().logsumexp(0)
    assert chosen.logp is not None and abs(chosen.logp - float(expected[chosen.token])) < 1e-5
    assert [token for token, _ in chosen.top] == expected.argsort(descending=True)[:top].tolist()
    assert all(abs(logp - float(expected[token])) < 1e-5 for token, logp in chosen.top)
    assert sum(numpy.exp([logp for _, logp in chosen.top])) <= 1 + 1e-5


def test_a_bias_of_a_hundred_forces_or_bans_a_token() -> None:
    rows = logits(5, 8)
    forced = Sampling(8, temperature=1.0, seed=1, logit_bias=((11, 100.0),))
    assert {chosen.token for chosen in say(forced, rows)} == {11}
    banned = tuple((int(token), -100.0) for token in rows.argmax(-1))
    assert not {c.token for c in say(Sampling(8, logit_bias=banned), rows)} & {token for token, _ in banned}


def test_no_seed_means_another_answer_each_time() -> None:
    rows = logits(1, 30, scale=0.1)
    how = Sampling(30, temperature=1.0)
    assert [c.token for c in say(how, rows)] != [c.token for c in say(how, rows)]
