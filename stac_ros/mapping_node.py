"""The node: a camera topic in, a live map out. Callbacks only pass on; two threads do the work."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from builtin_interfaces.msg import Time
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.clock import Clock, ClockType
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header
from std_srvs.srv import SetBool, Trigger

from stac_core import LoadedNetwork, StreamSession, check_budget, load_network, warm_up
from stac_core.config import Config, require_stream
from stac_core.version import version
from stac_ros import clouds, parameter_files, topics, transforms
from stac_ros.autosave import Autosave
from stac_ros.camera_info import CameraCalibration
from stac_ros.diagnostics import Facts, InputState, MapState, diagnostic_array
from stac_ros.image_library import image_library
from stac_ros.inference_worker import InferenceWorker
from stac_ros.logs import log_to_ros
from stac_ros.map_directory import home_expanded, new_folder, try_to_write
from stac_ros.mapper import Mapper
from stac_ros.mapping_worker import MappingWorker
from stac_ros.node_process import ClosingNode, own_arguments, run_node
from stac_ros.odometry import OdometryLink
from stac_ros.outputs import Outputs
from stac_ros.parameters import Parameters, told_as_parameters
from stac_ros.predictor import Predictor
from stac_ros.run_statistics import Statistics
from stac_ros.topics import Service, qos_profile
from stac_ros.transforms import transform_buffer
from stac_ros.watchdog import Watchdog

DIAGNOSTICS_PERIOD_S = 1.0  # a convention of ROS
HELP = """The mapping node: turns a camera topic into a live 3D map. It takes arguments of ROS alone:

    stac_node --ros-args -r image:=/camera/image_raw -p cache.memory_budget:=2000000000
    stac_node --ros-args --params-file mine.yaml

`ros2 param describe /stac_mapping NAME` explains a parameter of the running node, `stac-ros parameters`
prints all of them (docs/parameters.md). README.md has topics and services, docs/node.md frames.
`stac-ros up`, or `ros2 launch stac_ros stac.launch.py`, starts the node together with replay, recorder,
viewer and RViz."""

logger = logging.getLogger("stac_ros.mapping_node")  # also where this file is run as __main__


class MappingNode(ClosingNode):
    """Topics, services and timers around a `Predictor` and a `Mapper`, each on a thread of its own.

    Everything that can be refused is refused here, before anything is subscribed to: ValueError for
    parameters and weights.
    """

    def __init__(self) -> None:
        super().__init__(topics.NODE_NAME, automatically_declare_parameters_from_overrides=True)
        log_to_ros(self.get_logger())
        self.parameters = Parameters(self)
        core, ros = self.parameters.core, self.parameters.ros
        logger.info("configuration (* differs from the default)\n%s", self.parameters.describe())
        for complaint in parameter_files.complaints(sys.argv, self.get_fully_qualified_name()):
            logger.warning(complaint)
        require_stream(core)
        _warn_of_map_directory(ros.map.directory)
        started = time.monotonic()
        loaded = load_network(core.model, core.kernels)
        with told_as_parameters():
            StreamSession(loaded.network, core)  # what does not go together is refused before all else
        if _has_room(loaded, core) and loaded.device.type == "cuda":
            warm_up(loaded.network, core)  # now, not with the first image
        session = StreamSession(loaded.network, core)  # only now is all else there that takes memory
        logger.info("network ready in %.1f s: %s", time.monotonic() - started, loaded.weights)
        self.facts = _facts(self.get_fully_qualified_name().lstrip("/"), loaded)
        logger.info("libraries: %s", self.facts.libraries)

        self.statistics = Statistics()
        self.calibration = CameraCalibration(raw=ros.input.rectify)
        self.outputs = Outputs(self, self.parameters, self.calibration)
        odometry = OdometryLink(transform_buffer(self), ros.frames) if ros.frames.odom else None
        self.mapper = Mapper(self.parameters, self.statistics, self.outputs)
        self.mapping = MappingWorker(self.mapper, self.statistics)
        self.predictor = Predictor(
            session, self.parameters, self.statistics, self.mapping, odometry, self.calibration
        )
        self.autosave = Autosave(self.predictor, self.mapper, self.parameters, self.statistics)
        if ros.map.load:
            self._load(ros.map.load)
        self._reported = self.statistics.snapshot()
        self.inference = InferenceWorker(
            self.predictor.process,
            core.cache.chunk_size,
            ros.worker.mailbox_size,
            self.statistics,
            ros.worker.chunk_wait,
        )
        self._newest: Time | None = None  # stamp of the newest image
        self._last: Time | None = None  # stamp of the last image of a recording, once it is known
        self._offer_services()
        self._start_timers()
        self._subscribe()
        self.inference.start()

    def _load(self, name: str) -> None:
        """Go on with a saved map. ValueError where that is not possible."""
        try:
            folder = home_expanded(name)
            self.mapper.load(folder)  # the first to say what is no such folder
            self.predictor.load(folder)
        except (ValueError, OSError) as error:
            raise ValueError(f"map.load = {name!r}: {error}") from error

    def close(self) -> None:
        """Finish the chunk at hand and see it delivered, with the map that holds it."""
        self.inference.stop()
        self.mapping.stop()
        if self.parameters.ros.map.autosave:
            self.autosave.finish()  # first of all that is left: who waits too long for the end kills
        self.outputs.publish_whole(self.mapper.map, self.mapper.grid)  # whose thread has ended
        self.outputs.flush()
        logger.info("stopped: %d images mapped", self.statistics.snapshot().mapped)

    def on_image(self, message: Image | CompressedImage) -> None:
        self.inference.offer(message)
        self._newest = message.header.stamp
        self._flush_at_the_end()

    def on_end_of_input(self, last: Header) -> None:
        """May come before that image: the two travel on topics of their own."""
        self._last = last.stamp
        self._flush_at_the_end()

    def on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        said = "stream, map and trajectory are empty; the next image begins a new stream"
        return self._answer(response, self.predictor.reset, lambda: said)

    def on_pause(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        said = "paused: images are ignored, the map stays" if request.data else "running"
        return self._answer(response, lambda: self.predictor.pause(request.data), lambda: said)

    def on_save_map(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        try:
            folder = new_folder(self.parameters.ros.map.directory)
        except OSError as error:
            return _refusal(response, error)
        return self._answer(response, lambda: self.predictor.save(folder), lambda: self.mapper.save(folder))

    def on_relocalize(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        said = "the camera is looked for in the map; images that do not show it are left out"
        return self._answer(response, self.predictor.relocalize, lambda: said)

    def on_autosave_timer(self) -> None:
        self.autosave.order(self.inference, self.mapping)

    def on_map_timer(self) -> None:
        self.outputs.warn_of_no_grid()
        if self.outputs.whole_is_due():
            self.mapping.order(lambda: self.outputs.publish_whole(self.mapper.map, self.mapper.grid))

    def on_diagnostics_timer(self) -> None:
        counts = self.statistics.snapshot()
        source = InputState(
            topic=self.watchdog.topic,
            publishers=self.watchdog.publishers,
            complaint=self.watchdog.complaint(counts),
            waiting=self.inference.waiting,
            paused=self.predictor.paused,
            searching=self.predictor.searching,
        )
        message = diagnostic_array(
            self.get_clock().now().to_msg(),
            self.facts,
            source,
            counts,
            self._reported,
            self.predictor.session_stats,
            self._map_state(),
        )
        self._reported = counts
        self._diagnostics.publish(message)

    def _flush_at_the_end(self) -> None:
        if self._newest == self._last:
            self.inference.flush()
            self._last = None  # the next recording may pass this stamp and go on

    def _map_state(self) -> MapState:
        mapper, figures = self.mapper, self.mapper.map.figures
        return MapState(
            **vars(figures),
            coarsened=figures.voxel_size > self.parameters.ros.map.voxel_size,
            poses=len(mapper.trajectory),
            scale=str(mapper.scale),
            intrinsics=self.calibration.source,
        )

    def _answer(self, response: Any, act: Callable[[], None], report: Callable[[], str]) -> Any:
        """Have the inference thread act, then the mapping thread report, each after all that came before.

        Waits for the report, which may take as long as two chunks.
        """

        def command() -> Future[str]:
            act()
            return self.mapping.ask(report)

        try:
            response.message, response.success = self.inference.ask(command).result().result(), True
        except Exception as error:  # whatever it is, the caller hears it and the node lives on
            return _refusal(response, error)
        return response

    def _offer_services(self) -> None:
        group = MutuallyExclusiveCallbackGroup()  # may wait without holding up anything else

        def offer(service: Service, callback: Callable[..., Any]) -> None:
            self.create_service(service.type, service.name, callback, callback_group=group)

        offer(topics.RESET, self.on_reset)
        offer(topics.PAUSE, self.on_pause)
        offer(topics.SAVE_MAP, self.on_save_map)
        offer(topics.RELOCALIZE, self.on_relocalize)

    def _start_timers(self) -> None:
        """On a steady clock: a simulated one may stand still, and just then a warning is due."""
        topic = topics.DIAGNOSTICS
        self._diagnostics = self.create_publisher(topic.type, topic.name, topic.qos())
        clock, group = Clock(clock_type=ClockType.STEADY_TIME), MutuallyExclusiveCallbackGroup()

        def every(period_s: float, callback: Callable[[], None]) -> None:
            self.create_timer(period_s, callback, callback_group=group, clock=clock)

        ros = self.parameters.ros
        every(DIAGNOSTICS_PERIOD_S, self.on_diagnostics_timer)
        every(ros.publish.map_period, self.on_map_timer)
        if ros.map.autosave:
            every(ros.map.autosave, self.on_autosave_timer)
        if ros.frames.odom and ros.frames.publish_tf and ros.frames.republish_period:
            every(ros.frames.republish_period, self.outputs.placed.republish)

    def _subscribe(self) -> None:
        settings = self.parameters.ros.input
        image, other = topics.IMAGE, topics.COMPRESSED_IMAGE
        if settings.compressed:
            image, other = other, image
        group = MutuallyExclusiveCallbackGroup()
        info = topics.CAMERA_INFO
        self.create_subscription(
            info.type,
            info.name,
            self.calibration.receive,
            qos_profile(settings.camera_info_qos, info.depth),
            callback_group=group,
        )
        subscription = self.create_subscription(
            image.type,
            image.name,
            self.on_image,
            qos_profile(settings.image_qos, max(image.depth, self.inference.room)),
            callback_group=group,
        )
        end = topics.END_OF_INPUT
        self.create_subscription(end.type, end.name, self.on_end_of_input, end.qos(), callback_group=group)
        cure = f"set input.compressed to {str(not settings.compressed).lower()}"
        self.watchdog = Watchdog(self, subscription, settings.silence, {other: cure})
        logger.info("subscribed to %s (%s)", subscription.topic_name, settings.image_qos)


def _refusal(response: Any, error: Exception) -> Any:
    response.message, response.success = str(error), False
    logger.error("a service failed: %s", error)
    return response


def _has_room(loaded: LoadedNetwork, config: Config) -> bool:
    """Whether the cache holds a usual image; as one of another shape may take less, this only warns."""
    try:
        check_budget(loaded.network, config, loaded.dtype)
    except ValueError as error:
        logger.warning("4:3 images cannot be mapped: %s", error)
        return False
    return True


def _warn_of_map_directory(directory: str) -> None:
    """No reason to refuse: a map may be all that is wanted of a live run, and the folder may yet change."""
    try:
        try_to_write(directory)
    except OSError as error:
        logger.warning("%s", error)


def _facts(node: str, loaded: LoadedNetwork) -> Facts:
    libraries = (
        f"images by {image_library().name}; clouds by {clouds.LIBRARY}; transforms by {transforms.LIBRARY}"
    )
    return Facts(
        node=node,
        network=loaded.config.name,
        weights=loaded.weights,
        device=str(loaded.device),
        dtype=str(loaded.dtype).removeprefix("torch."),
        machine=loaded.machine,
        version=version(),
        libraries=libraries,
    )


def main(args: list[str] | None = None) -> None:
    """Command `stac_node`. Ends with status 1 and one message where it cannot start."""
    form = argparse.RawDescriptionHelpFormatter
    own_arguments(argparse.ArgumentParser("stac_node", description=HELP, formatter_class=form), args)
    sys.exit(run_node(MappingNode, topics.NODE_NAME, args))


if __name__ == "__main__":
    main()
