#!/usr/bin/env python3
"""Reads a folder of event files with TensorBoard's own readers and prints what they see as JSON.

usage: read_tensorboard.py FOLDER          needs: pip install tensorboard

{"events": how many records the files hold, "scalars": {tag: [[step, value], ...] after dropping what a resume replaced}}
"""

import json
import logging
import pathlib
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util import tensor_util

folder = pathlib.Path(sys.argv[1])
logging.disable(logging.WARNING)  # the note about dropped events is what is asked for here

events = sum(1 for path in sorted(folder.glob("events.out.tfevents.*")) for _ in EventFileLoader(str(path)).Load())

accumulator = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
accumulator.Reload()
scalars = {
    tag: [[event.step, float(tensor_util.make_ndarray(event.tensor_proto))] for event in accumulator.Tensors(tag)]
    for tag in accumulator.Tags()["tensors"]
}
scalars |= {tag: [[event.step, event.value] for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}
json.dump({"events": events, "scalars": scalars}, sys.stdout)
