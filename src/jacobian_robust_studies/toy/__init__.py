"""The toy model: classifiers of points of the plane, on which the note's geometry can be drawn.

``jacobian-robust study toy RUN --out DIRECTORY`` draws the figures and writes every number that is quoted to
``toy.json``. RUN is what ``train.py experiment=toy`` left, or any directory with the checkpoints of two classifiers of
the plane, one trained with a penalty and one without.
"""
