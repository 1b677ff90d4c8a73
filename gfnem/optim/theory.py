"""Exact second moments of momentum on models that can be solved.

e is the distance of a parameter from the optimum and m (of DANA, y) its momentum. For each
parameter three numbers, E e^2, E m^2 and E[e m], follow from those of the step before, so that a
step costs as much as the parameters are many, and no data is drawn. Functions that take a step
work on NumPy arrays and on tensors, element by element along all but the last dimension, and
should be given float64.

Models:
    Power-law random features (arXiv 2505.16098), with `dana_step`.
    Sparse least squares, a model of tokens with frequencies as in arXiv 2605.28961, with
        `sparse_step`, and where it oscillates, is stable and stays.
    The bias of a class that is rare, with `rare_bias_step` around the optimum and
        `rare_weight_step` far from it; with Gaussian features in many dimensions,
        `rare_features_step`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

# Nodes and weights of integrals over a standard normal.
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(80)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


class Moments(NamedTuple):
    """Second moments of each parameter, [..., parameters].

    Example:
        >>> import numpy as np
        >>> moments = Moments(error=np.ones(2), momentum=np.zeros(2), cross=np.zeros(2))
        >>> frequencies = np.array([0.5, 0.01])
        >>> for _ in range(100):
        ...     moments = sparse_step(moments, frequencies, lr=0.02, momentum=0.9, batch=8)
        >>> moments.error.round(3).tolist()
        [0.0, 0.7]

    error: E e^2.
    momentum: E m^2.
    cross: E[e m].
    """

    error: Float[Any, "*runs parameters"]
    momentum: Float[Any, "*runs parameters"]
    cross: Float[Any, "*runs parameters"]


class RandomFeatures(NamedTuple):
    """Least squares on random features, in the eigenbasis of the features' covariance.

    Example:
        >>> problem = power_law_features(torch.eye(3, dtype=torch.float64), alpha=1.0, beta=0.0)
        >>> (problem.eigenvalues * 36).round().tolist()
        [36.0, 9.0, 4.0]

    eigenvalues: of the covariance of the features.
    directions: its eigenvectors, as columns.
    optimum: parameters of the least risk.
    error: (theta_i - optimum_i)^2 along each direction, at theta = 0.
    floor: twice the least risk.
    """

    eigenvalues: Float[Tensor, "d"]
    directions: Float[Tensor, "d d"]
    optimum: Float[Tensor, "d"]
    error: Float[Tensor, "d"]
    floor: Float[Tensor, ""]


def power_law_features(weights: Float[Tensor, "v d"], alpha: float, beta: float) -> RandomFeatures:
    """Solve least squares on random features of data with a power law.

    x_j ~ N(0, j^(-2 alpha)) for j = 1..v, features W^T x, target sum_j j^(-beta) x_j. With W' =
    diag(j^-alpha) W and b' = j^(-alpha - beta), the risk is |W' theta - b'|^2 / 2.

    Args:
        weights: W; the paper draws its entries from N(0, 1 / d). v is at least d.
        alpha: of the data.
        beta: of the target.
    """
    j = torch.arange(1, len(weights) + 1, dtype=weights.dtype, device=weights.device)
    left, singular, right = torch.linalg.svd(j[:, None] ** -alpha * weights, full_matrices=False)
    target = j ** (-alpha - beta)
    along = left.T @ target
    rotated = along / singular
    return RandomFeatures(
        eigenvalues=singular**2,
        directions=right.T,
        optimum=right.T @ rotated,
        error=rotated**2,
        floor=(target - left @ along).square().sum(),
    )


def risk(
    moments: Moments, eigenvalues: Float[Any, "d"], floor: float | Tensor
) -> Float[Any, "*runs"]:
    """Give the expected risk, (sum_j lambda_j E e_j^2 + floor) / 2."""
    return ((eigenvalues * moments.error).sum(-1) + floor) / 2


def dana_step(
    moments: Moments,
    eigenvalues: Float[Any, "d"],
    floor: float | Tensor,
    batch: float,
    decay: Any,
    gamma1: Any,
    gamma2: Any,
    gamma3: Any,
) -> Moments:
    """Take one step of DANA on Gaussian features.

    With e = theta - theta*, r = E e^2, s = E y^2, x = E[e y], lambda the eigenvalues,
    P = sum_j lambda_j r_j + floor, c = gamma2 + gamma1 gamma3 and a = 1 - decay:

        G = E g^2 = (1 + 1/B) lambda^2 r + lambda P / B
        r' = r - 2 c lambda r + c^2 G + gamma3^2 a^2 s - 2 gamma3 a x + 2 c gamma3 a lambda x
        s' = a^2 s + 2 a gamma1 lambda x + gamma1^2 G
        x' = a x + gamma1 lambda r - c (a lambda x + gamma1 G) - gamma3 a (a s + gamma1 lambda x)

    Exact for features that are Gaussian with independent noise of variance `floor`, which is what
    `power_law_features` are given their weights; batches are drawn anew in each step.

    Args:
        moments: of the distance along each eigenvector, before the step.
        eigenvalues: of the features' covariance.
        floor: twice the least risk.
        batch: B, data points in a step; infinite for exact gradients.
        decay: of DANA at this step, as the other three.
        gamma1: of the gradient in the momentum.
        gamma2: of the gradient in the step.
        gamma3: of the momentum in the step.
    """
    r, s, x = moments
    a = 1 - decay
    c = gamma2 + gamma1 * gamma3
    loss = 2 * risk(moments, eigenvalues, floor)[..., None]
    square = (1 + 1 / batch) * eigenvalues**2 * r + eigenvalues * loss / batch
    slope, pull = eigenvalues * r, eigenvalues * x
    return Moments(
        error=r
        - 2 * c * slope
        + c**2 * square
        + (gamma3 * a) ** 2 * s
        - 2 * gamma3 * a * x
        + 2 * c * gamma3 * a * pull,
        momentum=a**2 * s + 2 * a * gamma1 * pull + gamma1**2 * square,
        cross=a * x
        + gamma1 * slope
        - c * (a * pull + gamma1 * square)
        - gamma3 * a * (a * s + gamma1 * pull),
    )


def active_share(p: Any, batch: float) -> Any:
    """Give the probability that a feature of frequency p is in a batch, 1 - (1 - p)^B."""
    return 1 - (1 - p) ** batch


def sparse_step(
    moments: Moments,
    p: Float[Any, "d"],
    lr: Any,
    momentum: Any,
    batch: float,
    noise: float = 0.0,
    lazy: bool = False,
) -> Moments:
    """Take one step of SGD with Polyak's momentum on sparse least squares.

    x_i = s_i a_i with s_i ~ Bernoulli(p_i) and a_i ~ N(0, 1), all independent;
    y = <x, theta*> + noise N(0, 1). With eta the learning rate, beta the momentum, r = E e^2,
    M = E m^2, x = E[e m], and q = 1 - (1 - p)^B where rows wait (lazy), q = 1 where they do not:

        G = E g^2 = (3 p r + p (sum_j p_j r_j - p r) + p noise^2) / B + (1 - 1/B) p^2 r
        K = q beta^2 M + 2 beta p x + G
        M' = (1 - q) M + K
        r' = r - 2 eta (q beta x + p r) + eta^2 K
        x' = (1 - q) x + q beta x + p r - eta K

    Exact where batches are drawn anew in each step.

    Args:
        moments: before the step.
        p: frequency of each feature.
        lr: learning rate.
        momentum: in [0, 1).
        batch: B, data points in a step; infinite for exact gradients.
        noise: standard deviation of the noise of y.
        lazy: features that are not in a batch neither move nor decay their momentum.
    """
    of_others = (p * moments.error).sum(-1)[..., None] - p * moments.error
    one = 3 * p * moments.error + p * of_others + p * noise**2
    square = one / batch + (1 - 1 / batch) * p**2 * moments.error
    return _polyak_step(moments, p, square, lr, momentum, _share(p, batch, lazy))


def _polyak_step(
    moments: Moments, slope: Any, square: Any, lr: Any, momentum: Any, active: Any
) -> Moments:
    """Momentum where E[g | e] = slope e and E g^2 = square, in a share of the steps."""
    r, m, x = moments
    fresh = active * momentum**2 * m + 2 * momentum * slope * x + square
    cross = active * momentum * x + slope * r
    return Moments(
        error=r - 2 * lr * cross + lr**2 * fresh,
        momentum=(1 - active) * m + fresh,
        cross=(1 - active) * x + cross - lr * fresh,
    )


def retention(p: Any, momentum: Any, batch: float, lazy: bool = False) -> Any:
    """Give how many active updates of a feature its momentum survives.

    q / (1 - beta) with q the share of active steps, so few for rare features; 1 / (1 - beta)
    whatever the frequency where rows wait.
    """
    return (1.0 if lazy else active_share(p, batch)) / (1 - momentum)


def learning(p: Any, lr: Any, momentum: Any, batch: float) -> Any:
    """Give how many active updates of a feature reduce its squared error by the factor e.

    q (1 - beta) / (2 eta p), for learning that is slow beside `retention`; lazy or not.
    """
    return active_share(p, batch) * (1 - momentum) / (2 * lr * p)


def oscillation_lr(p: Any, momentum: Any, batch: float, lazy: bool = False) -> Any:
    """Give the learning rate above which the mean error of sparse least squares oscillates.

    eta p = q (1 - sqrt(beta))^2 with q = 1 where rows do not wait. There `learning` is
    (1 + sqrt(beta))^2 / 2 of `retention`, about twice of it for momentum near 1.
    """
    return _share(p, batch, lazy) * (1 - momentum**0.5) ** 2 / p


def stability_lr(p: Any, momentum: Any, batch: float, d: int, lazy: bool = False) -> Any:
    """Give the learning rate from which on the squared error of sparse least squares grows.

    For d features of the same frequency p, with k = (3 p + p^2 (d - 1)) / B + (1 - 1/B) p^2, so
    that G = k r without noise, and q = 1 where rows do not wait:

        eta = (1 - beta^2) / ((1 + beta) k / (2 p) - beta p / q)

    This is a condition on the gradients' noise; `oscillation_lr` is another one.
    """
    return _stability_lr(p, _sparse_curvature(p, batch, d), momentum, _share(p, batch, lazy))


def stationary_error(
    p: Any, lr: Any, momentum: Any, batch: float, d: int, noise: float, lazy: bool = False
) -> Any:
    """Give E e^2 of each feature of sparse least squares after infinitely many stable steps.

    With n = p noise^2 / B and the other symbols as in `stability_lr`:

        r = n / (2 p (1 - beta) / eta + 2 beta p^2 / (q (1 + beta)) - k)
    """
    curvature = _sparse_curvature(p, batch, d)
    active = _share(p, batch, lazy)
    return _stationary_error(p, curvature, p * noise**2 / batch, lr, momentum, active)


def _share(p: Any, batch: float, lazy: bool) -> Any:
    """How many steps a feature takes part in."""
    return active_share(p, batch) if lazy else 1.0


def _sparse_curvature(p: Any, batch: float, d: int) -> Any:
    return (3 * p + p**2 * (d - 1)) / batch + (1 - 1 / batch) * p**2


def _stability_lr(slope: Any, curvature: Any, momentum: Any, active: Any) -> Any:
    lowered = (1 + momentum) * curvature / (2 * slope) - momentum * slope / active
    return (1 - momentum**2) / lowered


def _stationary_error(
    slope: Any, curvature: Any, variance: Any, lr: Any, momentum: Any, active: Any
) -> Any:
    """Where E[g | e] = slope e and E g^2 = curvature e^2 + variance."""
    regained = 2 * momentum * slope**2 / (active * (1 + momentum))
    return variance / (2 * slope * (1 - momentum) / lr + regained - curvature)


def rare_bias_step(moments: Moments, p: Any, lr: Any, momentum: Any, batch: float) -> Moments:
    """Take one step of SGD with Polyak's momentum on the bias of a rare class.

    Logistic regression with a bias alone; e is its distance from log(p / (1 - p)). Expanded around
    the optimum, with h = p (1 - p), E[g | e] = h e and G = E g^2 = h^2 r + h / B; M, r and x go on
    as in `sparse_step` with h for p. An approximation for small lr / ((1 - momentum) B): it is off
    by about 8 % at 0.3 and useless above 1.

    Args:
        moments: of biases, before the step.
        p: probability of the class.
        lr: learning rate.
        momentum: in [0, 1).
        batch: B, data points in a step.
    """
    h = p * (1 - p)
    square = h**2 * moments.error + h / batch
    return _polyak_step(moments, h, square, lr, momentum, 1.0)


def rare_bias_stationary(p: Any, lr: Any, momentum: Any, batch: float) -> Any:
    """Give E e^2 of `rare_bias_step` after infinitely many steps.

    eta / (2 B (1 - beta)) / (1 - eta h / (2 (1 + beta))).
    """
    h = p * (1 - p)
    return _stationary_error(h, h**2, h / batch, lr, momentum, 1.0)


def rare_weight_step(mean: Any, square: Any, p: Any, lr: float, batch: float) -> tuple[Any, Any]:
    """Take one step of SGD on the bias of a class, for p towards 0, however far it is.

    With e the bias' distance from the optimum and k ~ Poisson(B p) data points of the class in the
    batch, w = exp(-e) goes by

        w' = (w + eta p) exp(-eta k / B),

    so that E w and E w^2 close:

        E w' = (E w + eta p) exp(-B p (1 - exp(-eta / B)))
        E w'^2 = (E w^2 + 2 eta p E w + (eta p)^2) exp(-B p (1 - exp(-2 eta / B)))

    The limit leaves out terms that are smaller by p and by eta p / w.

    Args:
        mean: E w before the step.
        square: E w^2 before the step.
        p: probability of the class.
        lr: learning rate, eta.
        batch: B, data points in a step.

    Returns:
        E w and E w^2 after the step.
    """
    drift = lr * p
    first, second = (math.exp(-n * lr / batch) for n in (1, 2))
    moved = square + 2 * drift * mean + drift**2
    return (
        (mean + drift) * math.e ** (-batch * p * (1 - first)),
        moved * math.e ** (-batch * p * (1 - second)),
    )


class Overlaps(NamedTuple):
    """Logistic regression on features of many dimensions, in a few numbers.

    mean: weights . mu, where mu is the mean of the rare class.
    square: |weights|^2.
    bias: of the logit.
    momentum_mean: m . mu, where m is the weights' momentum.
    momentum_weights: m . weights.
    momentum_square: |m|^2.
    momentum_bias: momentum of the bias.
    """

    mean: float
    square: float
    bias: float
    momentum_mean: float = 0.0
    momentum_weights: float = 0.0
    momentum_square: float = 0.0
    momentum_bias: float = 0.0

    def logits(self, rare: bool) -> Float[np.ndarray, "nodes"]:
        """Logits of a class at the nodes of integrals over it."""
        return self.bias + rare * self.mean + math.sqrt(self.square) * _NODES


def rare_features_step(
    overlaps: Overlaps, p: float, lr: float, momentum: float, batch: float, d: int, signal: float
) -> Overlaps:
    """Take one step of SGD with Polyak's momentum on logistic regression with a rare class.

    x ~ N(mu, I) with probability p, label 1; x ~ N(0, I) otherwise, label 0. The logit z is normal
    in each class, so with r = sigmoid(z) - label and Stein's lemma

        E g = u mu + s theta, with u = p E[r | 1] and s = E sigmoid'(z)
        E |g|^2 = d E r^2 / B + (1 - 1/B) |E g|^2

    and all products of theta, its momentum and mu close. A limit: exact for d towards infinity at
    learning rates that fall like 1 / d, where the products no longer vary from run to run.

    Args:
        overlaps: before the step.
        p: probability of the class.
        lr: learning rate of weights and bias.
        momentum: in [0, 1).
        batch: B, data points in a step.
        d: dimensions of the features.
        signal: |mu|^2.
    """
    o = overlaps
    share = np.array([1 - p, p])
    sigmoids = 1 / (1 + np.exp(-np.stack([o.logits(False), o.logits(True)])))
    rest = sigmoids - np.array([[0.0], [1.0]])
    mean = share * (rest @ _WEIGHTS)
    u, s = mean[1], float(share @ ((sigmoids * (1 - sigmoids)) @ _WEIGHTS))
    of_mean, of_weights = u * signal + s * o.mean, u * o.mean + s * o.square
    of_momentum = u * o.momentum_mean + s * o.momentum_weights
    square = u * of_mean + s * of_weights
    square = d * float(share @ (rest**2 @ _WEIGHTS)) / batch + (1 - 1 / batch) * square
    momentum_mean = momentum * o.momentum_mean + of_mean
    momentum_weights = momentum * o.momentum_weights + of_weights
    momentum_square = momentum**2 * o.momentum_square + 2 * momentum * of_momentum + square
    momentum_bias = momentum * o.momentum_bias + float(mean.sum())
    return Overlaps(
        mean=o.mean - lr * momentum_mean,
        square=o.square - 2 * lr * momentum_weights + lr**2 * momentum_square,
        bias=o.bias - lr * momentum_bias,
        momentum_mean=momentum_mean,
        momentum_weights=momentum_weights - lr * momentum_square,
        momentum_square=momentum_square,
        momentum_bias=momentum_bias,
    )


def rare_features_loss(overlaps: Overlaps, p: float) -> float:
    """Give the expected logistic loss in nats, exactly for given weights."""
    rare, other = overlaps.logits(True), overlaps.logits(False)
    return float(
        p * np.logaddexp(0, -rare) @ _WEIGHTS + (1 - p) * np.logaddexp(0, other) @ _WEIGHTS
    )
