"""The Fisher metric pulled back to the inputs: its matrix, its information balls and its geodesics.

A classifier with logits ``s(x)`` and ``θ = softmax(s)`` maps the inputs to the sphere of radius 2 by ``μ = 2√θ`` (eq.
5). The pulled-back metric is ``G = J_μᵀ J_μ`` (eq. 4). With as many inputs as the simplex has dimensions, ``n = m``,
the inputs with this metric are, by ``μ``, locally isometric to the sphere, wherever ``J_μ`` has full rank: geodesics
go to great circles. Equation numbers are those of the research note "Adversarial robustness with an upper-bound on
the norm of the Jacobian matrix".

Lengths of tangent vectors and radii are Fisher–Rao distances; positions are in units of the inputs. The functions are
pure and meant for a handful of inputs in float64: they form Jacobians whole.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.integrate import solve_ivp
from torch import Tensor

__all__ = [
    "Geodesics",
    "Logits",
    "geodesic_acceleration",
    "geodesics",
    "great_circle",
    "information_ball",
    "orientation",
    "pullback_metric",
    "semi_axes",
    "sphere_jacobian",
    "sphere_point",
]

Logits = Callable[[Float[Tensor, "batch n"]], Float[Tensor, "batch classes"]]
"""A classifier of inputs that do not influence each other."""

End = Literal["radius", "window", "fold", "length"]
"""What can end a geodesic."""

_ENDS: tuple[End, ...] = ("radius", "window", "fold")


def sphere_point(logits: Logits, points: Float[Tensor, "batch n"]) -> Float[Tensor, "batch classes"]:
    """Return ``μ = 2√θ`` at each point (eq. 5), by the logarithm of ``θ``: smooth however confident the prediction."""
    return 2 * (logits(points).log_softmax(-1) / 2).exp()


def _rows(logits: Logits, points: Tensor, *, create_graph: bool) -> tuple[Tensor, Tensor]:
    """Return a copy of the points and ``J_μ`` there, with a graph to the copy if asked for.

    A row at a time by reverse differentiation: for small networks torch's forward mode was ten times slower.
    """
    x = points.detach().clone().requires_grad_()
    with torch.enable_grad():
        mu = sphere_point(logits, x)
        rows = [_gradient(column, x, create_graph=create_graph) for column in mu.unbind(-1)]
    return x, torch.stack(rows, dim=1)


def _gradient(values: Float[Tensor, "batch"], x: Float[Tensor, "batch n"], *, create_graph: bool) -> Tensor:
    (gradient,) = torch.autograd.grad(
        values.sum(), x, create_graph=create_graph, retain_graph=True, materialize_grads=True
    )
    return gradient


def sphere_jacobian(logits: Logits, points: Float[Tensor, "batch n"]) -> Float[Tensor, "batch classes n"]:
    """Return ``J_μ``, the Jacobian of :func:`sphere_point`, at each point."""
    return _rows(logits, points, create_graph=False)[1]


def pullback_metric(logits: Logits, points: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n n"]:
    """Return ``G = J_μᵀ J_μ``, the matrix of the pulled-back Fisher metric in the inputs' coordinates (eq. 4)."""
    jacobian = sphere_jacobian(logits, points)
    return jacobian.mT @ jacobian


def semi_axes(
    metric: Float[Tensor, "*batch n n"], radius: Float[Tensor, "*batch"]
) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch n n"]]:
    """Return the semi-axes of the ellipsoid ``XᵀGX ≤ r²``, shortest first: their lengths, and directions as columns.

    The lengths are ``r/√λ`` for the eigenvalues ``λ`` of ``G``, in units of the inputs; the shortest is ``r/‖J_μ‖₂``.
    Eq. 10 says that it is at least ``ε`` for ``r = δ``. Where ``G`` is singular to rounding they are huge, but finite.
    """
    eigenvalues, axes = torch.linalg.eigh(metric)
    lengths = radius[..., None] / eigenvalues.clamp_min(torch.finfo(metric.dtype).tiny ** 0.5).sqrt()
    return lengths.flip(-1), axes.flip(-1)


def information_ball(
    metric: Float[Tensor, "n n"], radius: float, directions: Float[Tensor, "rays n"]
) -> Float[Tensor, "rays n"]:
    """Return the tangent vectors ``X = r G^{-1/2} u`` of Fisher–Rao length ``r``, the border of ``B̃(0, r)`` (eq. 9).

    Args:
        metric: ``G`` at a point.
        radius: ``r``.
        directions: unit vectors ``u``.
    """
    lengths, axes = semi_axes(metric, metric.new_tensor(radius))
    return directions @ (axes * lengths) @ axes.mT


def geodesic_acceleration(
    logits: Logits, points: Float[Tensor, "batch n"], velocities: Float[Tensor, "batch n"]
) -> Float[Tensor, "batch n"]:
    """Return ``ẍ = -Γ(ẋ, ẋ)``, the right-hand side of the geodesic equation of the pulled-back metric.

    For ``G = J_μᵀJ_μ`` the Christoffel symbols are ``Γ^k_ij = (G⁻¹J_μᵀ ∂_i∂_j μ)^k``, so that ``ẍ`` solves
    ``J_μ ẍ = -D²μ[ẋ, ẋ]`` by least squares: ``G``, whose condition is the square of ``J_μ``'s, is not formed.
    """
    return _acceleration(logits, points, velocities)[0]


def _acceleration(logits: Logits, points: Tensor, velocities: Tensor) -> tuple[Tensor, Tensor]:
    """Return the acceleration, and ``J_μ``."""
    x, jacobian = _rows(logits, points, create_graph=True)
    along = (jacobian * velocities[:, None]).sum(-1)
    bending = torch.stack(
        [(_gradient(column, x, create_graph=False) * velocities).sum(-1) for column in along.unbind(-1)], dim=1
    )
    jacobian = jacobian.detach()
    return torch.linalg.lstsq(jacobian, -bending[..., None]).solution[..., 0], jacobian


def _orientation(
    jacobian: Float[Tensor, "batch classes n"], mu: Float[Tensor, "batch classes"]
) -> Float[Tensor, "batch"]:
    """Return ``det J_μ`` on the sphere's tangent plane over ``‖J_μ‖₂^n``: its sign changes where ``μ`` folds over."""
    frame = torch.cat([jacobian / torch.linalg.matrix_norm(jacobian, 2)[:, None, None], mu[..., None] / 2], dim=-1)
    return torch.linalg.det(frame)


def orientation(logits: Logits, points: Float[Tensor, "batch n"]) -> Float[Tensor, "batch"]:
    """Return ``det J_μ`` on the sphere's tangent plane over ``‖J_μ‖₂^n``: its sign changes where ``μ`` folds over."""
    return _orientation(sphere_jacobian(logits, points), sphere_point(logits, points))


def great_circle(
    start: Float[Tensor, "classes"], velocity: Float[Tensor, "classes"], length: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch classes"]:
    """Return where the geodesic of the sphere of radius 2 is after some length.

    Args:
        start: ``μ``, of norm 2.
        velocity: a unit vector tangent to the sphere at ``start``.
        length: arc length.
    """
    angle = length[..., None] / 2
    return angle.cos() * start + 2 * angle.sin() * velocity


@dataclass(frozen=True)
class Geodesics:
    """Geodesics that leave a point in some directions, sampled at equal steps of their Euclidean length.

    Attributes:
        positions: where each of them is; nan beyond its end.
        lengths: its Fisher–Rao length up to there; nan beyond its end.
        ends: its last position.
        radius: its Fisher–Rao length at the end.
        why: what ended it: ``radius`` where it has the length that was asked for, ``window`` where it left the window,
            ``fold`` where the metric degenerates, ``length`` where its Euclidean length was spent.
    """

    positions: Float[Tensor, "rays samples n"]
    lengths: Float[Tensor, "rays samples"]
    ends: Float[Tensor, "rays n"]
    radius: Float[Tensor, "rays"]
    why: tuple[End, ...]


@dataclass(frozen=True)
class _Flow:
    """The geodesic equation of some rays at once, as scipy integrates it: each has a position, a heading and a length.

    Attributes:
        logits: the classifier.
        n: the number of inputs.
        orientation: of ``μ`` at the start.
        radius: the length at which a ray ends.
        low: the window's least coordinate.
        high: its greatest.
    """

    logits: Logits
    n: int
    orientation: float
    radius: float
    low: float
    high: float

    def parts(self, y: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        x, e, t = torch.from_numpy(np.reshape(y, (-1, 2 * self.n + 1)).copy()).split([self.n, self.n, 1], dim=1)
        return x, e, t[:, 0]

    def derivative(self, _: float, y: np.ndarray) -> np.ndarray:
        x, e, _t = self.parts(y)
        a, j = _acceleration(self.logits, x, e)
        # Beyond a fold the length runs back: a smooth function, whose zero the integration need not slow down for.
        sign = (_orientation(j, sphere_point(self.logits, x)) * self.orientation).sign()
        speed = sign * (j @ e[..., None]).squeeze(-1).norm(dim=-1)
        rates: np.ndarray = torch.cat([e, a - (a * e).sum(-1, keepdim=True) * e, speed[:, None]], dim=1).numpy().ravel()
        return rates

    def margins(self, y: np.ndarray) -> np.ndarray:
        """Return how far each ray is from each kind of end; it is there at 0."""
        x, _, t = self.parts(y)
        regular = orientation(self.logits, x) * math.copysign(1, self.orientation)
        edges = torch.minimum(x.amin(1) - self.low, self.high - x.amax(1))
        result: np.ndarray = torch.stack([self.radius - t, edges, regular], dim=1).numpy()
        return result

    def integrate(self, state: np.ndarray, times: np.ndarray, rtol: float) -> tuple[np.ndarray, np.ndarray, list[End]]:
        """Return the states of all rays at the times, nan beyond their ends; their last states; and what ended them.

        All rays are one system: an evaluation costs the same for one as for fifty. At an end the others go on.
        """

        def first_end(_: float, y: np.ndarray) -> float:
            return float(self.margins(y).min())

        first_end.terminal = True  # type: ignore[attr-defined]
        rays, window = len(state), self.high - self.low
        sampled = np.full((rays, len(times), 2 * self.n + 1), np.nan)
        why: list[End] = ["length"] * rays
        last, alive, start, step = state.copy(), np.arange(rays), 0.0, None
        while alive.size:
            first = int(np.searchsorted(times, start))
            solution = solve_ivp(
                self.derivative,
                (start, times[-1]),
                state.ravel(),
                method="DOP853",
                t_eval=times[first:],
                events=first_end,
                first_step=step,
                max_step=window / 20,
                rtol=rtol,
                atol=rtol / 10,
            )
            known = np.reshape(solution.y, (alive.size, 2 * self.n + 1, len(solution.t)))
            sampled[alive, first : first + len(solution.t)] = known.transpose(0, 2, 1)
            if solution.status < 0:
                raise ArithmeticError(f"the geodesic equation could not be integrated: {solution.message}")
            if solution.status == 0:
                last[alive] = known[:, :, -1]
                break
            start, state = float(solution.t_events[0][-1]), np.reshape(solution.y_events[0][-1], (-1, 2 * self.n + 1))
            left = self.margins(state)
            ended = left.min(1) <= max(float(left.min()), 0.0) + 1e-10
            last[alive[ended]] = state[ended]
            for ray, kind in zip(alive[ended], left[ended].argmin(1), strict=True):
                why[ray] = _ENDS[kind]
            alive, state = alive[~ended], state[~ended]
            step = min(1e-3 * window, times[-1] - start) or None
        return sampled, last, why


def geodesics(
    logits: Logits,
    point: Float[Tensor, "n"],
    radius: float,
    directions: Float[Tensor, "rays n"],
    *,
    low: float,
    high: float,
    samples: int = 401,
    rtol: float = 1e-8,
) -> Geodesics:
    """Return the geodesics from a point to the border of its geodesic ball ``B̃(x, r)`` (section 3.2).

    They start along the tangent vectors ``G^{-1/2}u`` and follow the geodesic equation as scipy integrates it. Its time
    is the Euclidean length: with ``a = -Γ(e, e)`` a curve of unit direction ``e`` has ``e' = (1 - eeᵀ)a``, and its
    Fisher–Rao length grows by ``t' = ‖J_μ e‖``. Unlike a curve of unit speed in the metric, it neither stops being
    smooth where the metric degenerates nor reaches infinity in finite time.

    ``exp_x`` need not be defined on all of ``B̃(0, r)``, as the note assumes for simplicity. A ray ends early where it
    leaves a window around the inputs, and where ``μ`` folds the inputs over (beyond, the curve runs back through the
    same predictions).

    Args:
        logits: the classifier, in float64, of one class more than there are inputs, ``n = m``.
        point: ``x``, in float64, where the metric is not degenerate.
        radius: ``r``, above 0.
        directions: unit vectors ``u``.
        low: the least value of a coordinate in the window.
        high: the greatest.
        samples: number of samples of a curve, over four times the window's side.
        rtol: relative tolerance of the integration; the absolute one is a tenth of it.

    Raises:
        ValueError: if the metric is degenerate at ``x``, or ``x`` is outside the window, or ``n`` is not ``m``.
    """
    rays, n = directions.shape
    jacobian, mu = sphere_jacobian(logits, point[None]), sphere_point(logits, point[None])
    if mu.shape[1] != n + 1:
        raise ValueError(f"there are {n} inputs and {mu.shape[1]} classes, which is not one class more")
    orientation = float(_orientation(jacobian, mu)[0])
    if abs(orientation) < 1e-9 or not low < float(point.min()) <= float(point.max()) < high:
        raise ValueError(f"no geodesic can start at {point.tolist()}: degenerate metric, or outside the window")
    heading = torch.nn.functional.normalize(information_ball((jacobian.mT @ jacobian)[0], 1.0, directions), dim=-1)
    state = torch.cat([point.expand(rays, n), heading, point.new_zeros(rays, 1)], dim=1).numpy()
    flow = _Flow(logits, n, orientation, radius, low, high)
    sampled, last, why = flow.integrate(state, np.linspace(0, 4 * (high - low), samples), rtol)
    positions, _, lengths = torch.from_numpy(sampled).split([n, n, 1], dim=2)
    ends, _, lasts = flow.parts(last)
    return Geodesics(positions, lengths[..., 0], ends, lasts, tuple(why))
