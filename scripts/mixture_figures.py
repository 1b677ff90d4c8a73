"""Runs of the mixture side by side: what their posteriors say, and which way their means went.

    gfnem --multirun task=mixture posterior=exact,mean_field,gflownet posterior.m_step=closed \
        run_dir=runs/mixture
    python scripts/mixture_figures.py runs/mixture/posterior=exact \
        runs/mixture/posterior=mean_field runs/mixture/posterior=gflownet --out figures
    gfnem compare runs/mixture metrics=test/log_likelihood,test/posterior_gap out=figures

writes mixture_assignments.png, test points coloured by the supercluster of a draw from q(z | x),
and mixture_means.png; the third command draws log-likelihoods over M-steps and seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from gfnem.app.build import build
from gfnem.app.composition import compose_stored
from gfnem.inference import inference
from gfnem.run import Run
from gfnem.run.plots import labelled_points, paths
from gfnem.tasks.mixture.evaluate import ways_of_means
from gfnem.tasks.mixture.model import HierarchicalMixture


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("figures"))
    arguments = parser.parse_args()
    assignments, ways = [], []
    points = torch.empty(0)
    for path in arguments.runs:
        run = Run.open(path)
        built = build(compose_stored(Run.open(path), []))
        em, test = built.em, built.data.test
        assert isinstance(em.model, HierarchicalMixture)
        state = run.load_checkpoint("best")
        em.model.load_state_dict(state["model"])
        em.posterior.load_state_dict(state["posterior"])
        name = run.config["posterior"]["_target_"].rpartition(".")[-1]
        with inference(em.model, em.posterior):
            drawn = em.posterior.sample(em.model, test, 1).z
        points = test.values[:, :2]
        means = em.model.means[:, :2].detach()
        assignments.append((name, drawn.supercluster[:, 0], means))
        ways.append((name, ways_of_means(em.model, run.metrics())))
    arguments.out.mkdir(parents=True, exist_ok=True)
    figures = {
        "assignments": labelled_points(points, assignments, columns=len(assignments)),
        "means": paths(points, ways),
    }
    for name, figure in figures.items():
        figure.savefig(arguments.out / f"mixture_{name}.png", dpi=100)


if __name__ == "__main__":
    main()
