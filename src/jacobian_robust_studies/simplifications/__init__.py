"""The note's six simplifications (section 3.5), measured one by one, and which of them accounts for each fall.

The condition of eq. 14, ``‖J_μ‖ ≤ d/ε``, is measured in four variants: the distance ``d`` is δ, to the simplex's center
(the note's), or d_B, to the decision boundary; the norm is the Frobenius norm (the note's penalty) or the spectral one.
It promises that no perturbation of a Euclidean length up to ``ε`` changes the prediction. A *fall* is a correct image
with a known adversarial perturbation that is not longer.

A *flat* metric is one that is constant over the ball, in the coordinates of the inputs: what the step from eq. 8 to
eq. 9 uses. The note asks for zero curvature there, which is less.
"""
