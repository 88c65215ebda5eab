"""Lightning callbacks: the scheduled weights and rates, the measurement of the network, the record of the epochs."""

from jacobian_robust.training.callbacks.monitors import AttackMonitor, CertificateMonitor, JacobianMonitor, Monitor
from jacobian_robust.training.callbacks.progress import TrainingProgress
from jacobian_robust.training.callbacks.record import EpochRecord
from jacobian_robust.training.callbacks.scheduled import ScheduledEps, ScheduledEta, ScheduledRate

__all__ = [
    "ScheduledEta",
    "ScheduledEps",
    "ScheduledRate",
    "Monitor",
    "JacobianMonitor",
    "AttackMonitor",
    "CertificateMonitor",
    "EpochRecord",
    "TrainingProgress",
]
