"""What sharpness says about a network: measured again at rescalings that change no prediction."""

from lowland.auditing.api import audit
from lowland.auditing.result import Audit

__all__ = ["Audit", "audit"]
