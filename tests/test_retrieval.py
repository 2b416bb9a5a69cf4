"""Ranks and the choice of expressions that retrieval rests on."""

import torch

from geodiff4d.evaluate.retrieval import distinct, ranks
from geodiff4d.heads import load_head


def test_ranks_count_what_is_nearer_and_ties_against_it():
    scores = torch.tensor([[3.0, 1.0, 2.0], [5.0, 4.0, 6.0], [1.0, 1.0, 1.0]])
    assert ranks(scores, torch.tensor([0, 1, 2])).tolist() == [0, 2, 2]


def test_chance_finds_a_tenth_of_ten():
    scores = torch.rand(2000, 10, generator=torch.Generator().manual_seed(0))
    found = ranks(scores, torch.arange(2000) % 10)
    assert abs((found == 0).float().mean() - 0.1) < 0.03 and abs((found < 3).float().mean() - 0.3) < 0.04


def test_chosen_expressions_lie_apart():
    head = load_head()
    params = head.neutral(12)
    params.expr[4, 3], params.expr[5, 3], params.expr[9, 7] = 1.0, 0.98, 0.9
    assert distinct(params, 3) == [0, 4, 9]
    assert len(distinct(params, 20)) == 12
