"""How people ask for a style: phrases per style, templates around them, and text that asks for none."""

from __future__ import annotations

import argparse

import numpy as np

from training.filters import FILTERS, NO_STYLE

PHRASES: dict[str, tuple[str, ...]] = {
    NO_STYLE: (
        "no style", "", "none", "original", "the original video", "unchanged", "keep it as it is", "no filter",
        "natural",
        "realistic", "photo", "real life", "a realistic photo", "leave it alone", "do nothing", "identity", "normal",
        "plain",
        "as is", "no effect", "photorealistic", "without any style",
    ),
    "pencil": (
        "pencil", "pencil sketch", "pencil drawing", "graphite drawing", "sketch", "hand-drawn sketch",
        "charcoal drawing",
        "drawn with a pencil", "sketchbook", "graphite", "a drawing on paper", "line drawing", "hatching",
        "charcoal", "crayon sketch",
    ),
    "ink": (
        "ink", "ink drawing", "black ink", "ink wash", "brush and ink", "sumi-e", "black and white ink", "woodcut",
        "linocut",
        "noir", "film noir", "high contrast black and white", "stencil", "manga ink", "calligraphy", "indian ink",
    ),
    "blueprint": (
        "blueprint", "technical drawing", "blueprint drawing", "architect's plan", "engineering drawing", "cyanotype",
        "white lines on blue", "construction plan", "schematic", "technical blueprint", "blue print",
        "architectural plan",
    ),
    "neon": (
        "neon", "neon lights", "neon glow", "glowing lines", "cyberpunk", "neon sign", "tron", "glowing neon outlines",
        "synth lights", "electric glow", "glow in the dark", "laser lines", "night club neon", "neon city",
    ),
    "thermal": (
        "thermal", "thermal camera", "heat map", "infrared", "thermal imaging", "heat vision", "heat camera",
        "predator vision",
        "temperature", "thermography", "infrared heat", "heatmap", "flir", "inferno colours",
    ),
    "sepia": (
        "sepia", "old photograph", "old film", "vintage", "vintage photo", "antique photo", "faded brown", "old movie",
        "1920s film", "daguerreotype", "sepia tone", "nostalgic", "western photo", "aged photo", "silent film",
        "retro photo",
    ),
    "night vision": (
        "night vision", "night-vision goggles", "nightvision", "green night camera", "military night scope",
        "image intensifier",
        "green phosphor", "night scope", "surveillance at night", "night vision goggles", "matrix green",
        "green monochrome",
    ),
    "comic": (
        "comic", "comic book", "cartoon", "comics", "graphic novel", "cel shading", "cartoon drawing",
        "bold outlines",
        "superhero comic", "anime", "toon", "comic strip", "flat colours", "thick black outlines", "manga in colour",
        "cel shaded",
    ),
    "watercolour": (
        "watercolour", "watercolor", "water colour painting", "aquarelle", "watercolor painting", "soft washes",
        "pale painting",
        "pastel painting", "gouache", "painted with water colours", "a pale wash", "pastel", "aquarell",
        "delicate painting",
    ),
    "vaporwave": (
        "vaporwave", "pink and teal", "duotone", "retrowave", "miami", "synthwave", "pink and turquoise",
        "80s aesthetic",
        "teal and pink", "outrun", "lo-fi aesthetic", "vapor wave", "vapourwave", "candy colours",
    ),
    "x-ray": (
        "x-ray", "xray", "x ray", "radiograph", "radiography", "hospital scan", "negative", "film negative", "inverted",
        "x-ray scan", "roentgen", "medical scan", "inverted colours", "photo negative",
    ),
    "pixel art": (
        "pixel art", "pixelart", "8-bit", "8 bit game", "retro video game", "pixelated", "pixels", "big pixels",
        "old console game", "mosaic", "blocky", "16-bit game", "sprite", "arcade game", "minecraft", "low resolution",
    ),
    "pop art": (
        "pop art", "popart", "warhol", "andy warhol", "screen print", "silkscreen", "lichtenstein", "posterized",
        "poster", "four colour print", "pop-art poster", "propaganda poster", "bold poster colours", "sixties poster",
    ),
    "aurora": (
        "aurora", "northern lights", "aurora borealis", "polar lights", "green and violet glow", "arctic night sky",
        "dreamy green glow", "aurora colours", "magic night glow", "polar night", "violet and green",
    ),
    "stained glass": (
        "stained glass", "stained-glass window", "church window", "cathedral window", "glass panes", "leaded glass",
        "tiffany glass", "coloured glass", "stained glass window", "diamond panes", "glass mosaic", "gothic window",
    ),
}  # fmt: skip
"""Ways to name each style. Unknown text counts as no style."""

TEMPLATES = (
    "{}", "{}", "{}", "{} style", "in {} style", "a {} of {s}", "a {} picture of {s}", "{s}, {}", "{s} as {}",
    "make it look like {}",
    "make it {}", "turn this into {}", "turn it into a {}", "restyle as {}", "{}, highly detailed", "please {}!",
    "{s} in the style of {}",
    "the look of {}", "{} version of the video", "everything should be {}", "I want {}", "can you do {} please?",
    "{} effect",
    "{} filter", "as if it were {}", "render {s} as {}, 4k, masterpiece", "an artistic {} rendering of {s}",
    "like a {}",
)  # fmt: skip

SUBJECTS = (
    "a cat in the grass", "a man", "a woman", "a dog", "the street", "a city at noon", "mountains",
    "a person talking", "my room",
    "a car", "trees", "the sea", "a face", "two people", "a cup of coffee", "flowers", "a bird", "a cat",
    "the garden", "a child playing",
    "a horse", "a robot", "the kitchen", "an old man", "a train", "clouds", "a fox walking", "the stage", "a dancer",
)  # fmt: skip

FILLERS = (
    "beautiful", "cinematic", "detailed", "4k", "sharp", "best quality", "stunning", "award winning", "smooth",
    "lovely", "epic", "very",
    "really", "the", "a", "with", "and", "in", "of", "good", "trending", "artstation", "professional", "✨", "🎨", "🔥",
    "😀", "hello", "video",
)  # fmt: skip

_LETTERS = "abcdefghijklmnopqrstuvwxyzäöüéñ"


def _nonsense(rng: np.random.Generator) -> str:
    return "".join(rng.choice(list(_LETTERS), int(rng.integers(2, 11))))


def _slip(rng: np.random.Generator, text: str) -> str:
    """One letter lost, doubled or swapped with its neighbour."""
    if len(text) < 6:
        return text
    i = int(rng.integers(1, len(text) - 1))
    kind = rng.integers(3)
    if kind == 0:
        return text[:i] + text[i + 1 :]
    if kind == 1:
        return text[:i] + text[i] + text[i:]
    return text[: i - 1] + text[i] + text[i - 1] + text[i + 1 :]


def sample_prompt(rng: np.random.Generator, style: str) -> str:
    """A random way to ask for ``style``. For no style it is often only a subject, fillers or words that mean nothing."""
    subject = SUBJECTS[rng.integers(len(SUBJECTS))]
    extras = [
        FILLERS[rng.integers(len(FILLERS))] if rng.random() < 0.6 else _nonsense(rng)
        for _ in range(rng.geometric(0.35) - 1)
    ]
    if style == NO_STYLE and rng.random() < 0.5:
        body = subject if rng.random() < 0.6 else " ".join(_nonsense(rng) for _ in range(int(rng.integers(0, 6))))
    else:
        phrases = PHRASES[style]
        phrase = phrases[rng.integers(len(phrases))]
        phrase = _slip(rng, phrase) if rng.random() < 0.25 else phrase
        phrase = f"{phrase}s" if phrase and rng.random() < 0.1 else phrase
        template = TEMPLATES[rng.integers(len(TEMPLATES))] if phrase else "{}"
        body = template.replace("{s}", subject).replace("{}", phrase)
    if rng.random() < 0.03 and style != NO_STYLE:
        extras += [_nonsense(rng) for _ in range(30)]
    cut = int(rng.integers(len(extras) + 1))
    text = " ".join([*extras[:cut], body, *extras[cut:]])
    return text.upper() if rng.random() < 0.08 else text.capitalize() if rng.random() < 0.3 else text


def all_styles() -> tuple[str, ...]:
    """Every style's name in a fixed order; the first is "no style"."""
    return tuple(FILTERS)


def names_of(text: str) -> tuple[str, ...]:
    """Styles by commas. Raises ArgumentTypeError, with those that there are, for an unknown one and for "no style"."""
    known = [name for name in all_styles() if name != NO_STYLE]
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"no such {', '.join(unknown)}; known: {', '.join(known)}")
    return names
