"""Saving unasked: what is on disk while a node maps, when saving fails, and after the node has ended."""

from __future__ import annotations

import logging
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from mapping_helpers import mapper_of
from node_helpers import NOBODYS, NodeProcess, Observer, header
from rcl_interfaces.srv import SetParameters
from rclpy.parameter import Parameter
from ros_helpers import ros_nodes
from walks import bundled, frames_of

from stac_ros import topics
from stac_ros.autosave import FAILED, Autosave
from stac_ros.clouds import cloud_points
from stac_ros.images import encode_image
from stac_ros.saved_map import MAP, POINTS, POSES, STREAM, SavedMap
from stac_ros.settings import MapSettings
from stac_ros.topics import qos_profile

WALK = "world:50,frames=24,height=126,width=168,step_max=0.03"
WHOLE = {MAP, POINTS, POSES, STREAM}
OFTEN_S, NEVER_S = 1.0, 1e5  # before the end
RELIABLE = {"input.image_qos": "reliable", "image.size": 168, "publish.map_period": 0.2}


def messages(chosen, first_stamp_s=100.0):
    """Images of the walk, a tenth of a second apart."""
    return [
        encode_image(frames_of(WALK)[index].image, "rgb8", header(first_stamp_s + index / 10))
        for index in chosen
    ]


def autosaves(directory: Path) -> set[Path]:
    """Those under their name; every one of them is whole, whenever one looks."""
    found = set(directory.glob("autosave_*"))
    return {folder for folder in found if "foreign" not in folder.name}


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def stamps(folder: Path) -> list[float]:
    return [float(line.split()[0]) for line in (folder / POSES).read_text().splitlines()]


@contextmanager
def largest_file(size: int, pid: int = 0):
    """What a full disk does to a file, and to no other process; 0 = of this process."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("value", [-1.0, 0.2, float("nan"), float("inf")])
def test_an_interval_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match=rf"MapSettings.autosave = {value}: "):
        MapSettings(autosave=value)


def test_a_disk_that_is_full_is_told_once_and_costs_no_save_that_is_there(tmp_path, caplog):
    given = {"map__directory": str(tmp_path)}
    with mapper_of(bundled(), **given) as (mapper, _, statistics), caplog.at_level(logging.INFO):
        autosave = Autosave(mapper.predictor, mapper.mapper, mapper.parameters, statistics)
        autosave.finish()
        assert not names(tmp_path), "nothing has been mapped"
        mapper.process(messages(range(2)))
        autosave.finish()
        (first,) = tmp_path.iterdir()
        assert names(first) == WHOLE
        mapper.process(messages([2]))
        points = np.random.default_rng(0).uniform(0, 9, (100_000, 3)).astype(np.float32)
        mapper.map.add(points, points, points[:, 0], 0)  # a file larger than that of the stream
        for largest in (1000, 1000, 2 * (first / STREAM).stat().st_size):  # then at the points
            with largest_file(largest):
                autosave.finish()
            assert list(tmp_path.iterdir()) == [first] and names(first) == WHOLE
        assert statistics.snapshot().events[FAILED] == 3
        told = [record.message for record in caplog.records if FAILED in record.message]
        assert len(told) == 1 + 1 and len({text.split(":")[0] for text in told}) == 2, "once for each cause"
        assert all(f"map.directory = '{tmp_path}' cannot be written: " in text for text in told)
        assert all("set it to another folder" in text for text in told)
        assert caplog.text.count("what was mapped since the last autosave is lost") == 3
        autosave.finish()
        (second,) = tmp_path.iterdir()
        assert second != first and stamps(second) == [100.0, 100.1, 100.2]
        autosave.finish()
        assert list(tmp_path.iterdir()) == [second], "nothing new has been mapped"


def test_a_map_is_on_disk_while_it_grows_and_when_the_node_ends(tmp_path):
    """One node that saves often, and one that goes on with what it left and saves at its end alone."""
    (tmp_path / "file").write_text("in the way")
    maps = tmp_path / "maps"
    foreign = maps / "autosave_foreign"  # of an earlier run, or of another node
    foreign.mkdir(parents=True)
    (foreign / MAP).write_text("precious")
    sent = messages(range(8))
    with ros_nodes("observer") as (node,):
        given = {"map.autosave": OFTEN_S, "map.directory": tmp_path / "file" / "maps"}
        with NodeProcess("often", RELIABLE | given) as first:
            observer = talk_to(node, first)
            observer.map_images(sent[0])
            observer.diagnostics_when(lambda found: int(found["input"].get(f"events: {FAILED}", 0)) >= 2)
            assert first.output.count(FAILED) == 1 and "set it to another folder" in first.output
            observer.map_images(sent[1])
            set_parameter(observer, "map.directory", NOBODYS)
            log = observer.spin_until(lambda: NOBODYS in first.output and first.output, "a warning")
            assert f"map.directory = '{NOBODYS}' cannot be written: ~nobody_at_all is nobody's home" in log
            answer = observer.call(topics.SAVE_MAP)
            assert not answer.success and NOBODYS in answer.message
            set_parameter(observer, "map.directory", str(maps))
            (one,) = observer.spin_until(lambda: autosaves(maps), "an autosave")
            assert names(one) == WHOLE and stamps(one) == [100.0, 100.1]
            with largest_file(100_000, first.pid):
                assert not observer.call(topics.SAVE_MAP).success, "and no folder is left of it, see below"
            asked_for = Path(observer.call(topics.SAVE_MAP).message.splitlines()[0]).parent

            observer.map_images(sent[2])
            observer.spin_until(
                lambda: autosaves(maps) - {one} and not one.exists(), "a later one in its place"
            )
            (two,) = autosaves(maps)
            assert stamps(two) == [100.0, 100.1, 100.2]

            assert observer.call(topics.RESET).success
            observer.forget()
            observer.map_images(*sent)
            first.signal(signal.SIGINT)
            assert first.wait() == 0
        (last,) = autosaves(maps) - {two}
        assert names(maps) == {folder.name for folder in (foreign, asked_for, two, last)}
        assert names(two) == names(asked_for) == names(last) == WHOLE and names(foreign) == {MAP}
        assert stamps(last) == [100 + i / 10 for i in range(8)]

        given = {"map.autosave": NEVER_S, "map.directory": maps, "map.load": last}
        with NodeProcess("at_the_end", RELIABLE | given) as second:
            observer = talk_to(node, second)
            shown = len(cloud_points(observer.wait(topics.MAP_POINTS))[0])
            assert shown == len(SavedMap.read(last / MAP).positions)
            observer.map_images(sent[4])
            second.signal(signal.SIGTERM)
            assert second.wait() == 0
        (own,) = autosaves(maps) - {two, last}
        assert names(own) == names(last) == WHOLE and stamps(own) == [100.4]
        assert len(SavedMap.read(own / MAP).positions) >= shown


def talk_to(node, process) -> Observer:
    observer = Observer(node, process, topics.IMAGE, qos_profile("reliable", 10))
    observer.wait_until_ready()
    return observer


def set_parameter(observer: Observer, name: str, value: str) -> None:
    service = f"/{observer.under_test.namespace}/{topics.NODE_NAME}/set_parameters"
    client = observer.node.create_client(SetParameters, service)
    observer.spin_until(client.service_is_ready, service)
    change = Parameter(name, value=value).to_parameter_msg()
    answer = client.call_async(SetParameters.Request(parameters=[change]))
    observer.spin_until(answer.done, f"the answer of {service}")
    assert answer.result().results[0].successful, answer.result().results[0].reason
