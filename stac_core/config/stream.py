"""How far a stream trusts its network: when it begins anew, and what refines its poses."""

from __future__ import annotations

from dataclasses import dataclass

from stac_core.config.network import NetworkConfig
from stac_core.settings import check_settings, refuse, setting

# What suits a network, where that was measured: how far it follows a camera from its first frame
# (`submap.reach`), and the landmarks that refine its poses (`tracking.landmarks`).
_REACH = {"embedded": 0.25}
_LANDMARKS = {"embedded": 250}


@dataclass(frozen=True)
class SubmapConfig:
    """When a stream goes on with an empty memory, seen from its latest frame or from one seen before."""

    reach: float = setting(
        -1.0,
        "how far the camera departs from a submap's first frame, its turn in radians plus its way in median "
        "depths, before the next submap begins; 0 = never; -1 = what suits the network: "
        f"{_REACH['embedded']} for the bundled model, 0 for others",
        minimum=-1.0,
    )
    keyframes: int = setting(
        64,
        "first frames of submaps that are kept, 16 bytes per network pixel each: where the camera comes back "
        "to one, the next submap begins there, and what drift had added is gone, also from what was mapped; "
        "0 = none",
        minimum=0,
        unit="frames",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if -1 < self.reach < 0:
            raise refuse(self, "reach", "neither a distance nor -1", 0.0)

    def reach_of(self, network: NetworkConfig) -> float:
        """The distance; 0 = a stream is one submap."""
        return _REACH.get(network.name, 0.0) if self.reach < 0 else self.reach


@dataclass(frozen=True)
class TrackingConfig:
    """Poses refined by points that are followed from frame to frame, of a calibrated camera."""

    landmarks: int = setting(
        -1,
        "points of the scene followed at once: their shifts refine poses and bring depths to one scale, "
        "where the camera's calibration is known; 0 = poses and depths are as the network says; -1 = what "
        f"suits the network: {_LANDMARKS['embedded']} for the bundled model, 0 for others",
        minimum=-1,
    )

    def __post_init__(self) -> None:
        check_settings(self)

    def landmarks_of(self, network: NetworkConfig) -> int:
        """The number; 0 = none are followed."""
        return _LANDMARKS.get(network.name, 0) if self.landmarks < 0 else self.landmarks
