"""Transcribe speech with a low-bit Whisper model (pip install openai-whisper).

python examples/whisper_transcribe.py --audio speech.wav --model base
python examples/whisper_transcribe.py                # random weights and noise: needs no download, says nothing
"""

import argparse
import tempfile

import torch
import whisper

from dist_lowbit import load_low_bit, optimize_model


def build(name: str | None) -> torch.nn.Module:
    if name is not None:
        return whisper.load_model(name, device="cpu")
    dims = whisper.model.ModelDimensions(
        n_mels=80, n_audio_ctx=1500, n_audio_state=64, n_audio_head=2, n_audio_layer=1,
        n_vocab=51865, n_text_ctx=448, n_text_state=64, n_text_head=2, n_text_layer=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = whisper.model.Whisper(dims)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--audio", help="a sound file (needs ffmpeg)")
    parser.add_argument("--model", help="a name that whisper knows; it is downloaded")
    args = parser.parse_args()

    model = optimize_model(build(args.model), low_bit="sym_int8")
    audio = args.audio or torch.randn(16000) * 0.1
    words = {"language": "English", "temperature": 0.0, "sample_len": None if args.audio else 4}
    text = model.transcribe(audio, **words)["text"]
    print(f"text: {text}")

    with tempfile.TemporaryDirectory() as directory:
        model.save_low_bit(directory)
        loaded = load_low_bit(build(args.model), directory)
        print("loaded says the same:", loaded.transcribe(audio, **words)["text"] == text)


if __name__ == "__main__":
    main()
