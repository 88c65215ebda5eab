"""Lightning callbacks: the schedules of η and ε, the measurement of the network, the record of the epochs."""

from jacobian_robust.training.callbacks.eps import EpsSchedule, GeometricEps, LinearEps
from jacobian_robust.training.callbacks.eta import ConstantEta, EtaSchedule, GeometricEta
from jacobian_robust.training.callbacks.monitors import AttackMonitor, JacobianMonitor, Monitor
from jacobian_robust.training.callbacks.progress import TrainingProgress
from jacobian_robust.training.callbacks.record import COLUMNS, METRICS, EpochRecord

__all__ = [
    "EtaSchedule",
    "GeometricEta",
    "ConstantEta",
    "EpsSchedule",
    "LinearEps",
    "GeometricEps",
    "Monitor",
    "JacobianMonitor",
    "AttackMonitor",
    "METRICS",
    "COLUMNS",
    "EpochRecord",
    "TrainingProgress",
]
