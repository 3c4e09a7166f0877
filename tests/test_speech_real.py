"""With real parts: a neural voice speaks, every container and codec carries it, Whisper hears it. make test-speech."""

import io
import json
import re
import time
import wave
from pathlib import Path

import numpy as np
import pytest

from clip_phi.cli import main
from clip_phi.samples import File
from clip_phi.speech.clip import clip_from_array, load_clip
from clip_phi.speech.speak import Speech, make_speaker, write_wav
from clip_phi.speech.transcribe import Transcript, make_transcriber

pytestmark = pytest.mark.speech

SENTENCES = (
    "How many shapes are there in the picture?",
    "What color is the triangle?",
    "Is there a green square above the yellow star?",
    "Describe the image in one sentence.",
    "The black dog runs across a field of grass.",
    "A man in a red jacket is riding a bicycle down the street.",
    "Two children are playing football near the river.",
    "Please read the sign behind the old house.",
    "Where is the woman with the blue umbrella going?",
    "There are three apples and a bottle of water on the table.",
)
# What is written of the sentences: suffix, codec, sampling rate, channels.
FORMATS = {
    "wav 8 kHz": ("wav", "pcm_s16le", 8000, 1),
    "wav 16 kHz": ("wav", "pcm_s16le", 16000, 1),
    "wav 44.1 kHz stereo": ("wav", "pcm_s16le", 44100, 2),
    "mp3": ("mp3", "mp3", 44100, 1),
    "flac": ("flac", "flac", 24000, 1),
    "ogg": ("ogg", "libopus", 48000, 1),
    "m4a": ("m4a", "aac", 44100, 1),
}
