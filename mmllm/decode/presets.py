"""The published decoding methods, each as a short program of views, terms and masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmllm.decode.layers import check_layers
from mmllm.decode.ops import LAYERS, op
from mmllm.decode.spec import DecodeSpec, Op, Select, Tap, Term, View
from mmllm.errors import unknown
from mmllm.registry import get, names, register

Builder = Callable[..., DecodeSpec]

# Media transforms of RITUAL; "random" draws one of the six per request.
RITUAL_TRANSFORMS = ("hflip", "vflip", "rotate", "jitter", "blur", "crop")
CONTRAST_VIEWS = (
    "blank", "drop", "patch_shuffle", "patch_mask", "diffuse", "silence", "noise", "time_reverse", "other", "identity",
    *RITUAL_TRANSFORMS,
)  # fmt: skip


def preset(name: str, weakness: str) -> Callable[[Builder], Builder]:
    """Registers a function that builds a spec from keyword parameters; ``weakness`` says what it is bad at."""

    def add(build: Builder) -> Builder:
        build.weakness = weakness  # type: ignore[attr-defined]
        return register("decode", name)(build)

    return add


def preset_of(name: str) -> Builder:
    """The builder of that method.

    Raises:
        UserError: there is none; the nearest one is named.
    """
    return get("decode", name)


def preset_names() -> list[str]:
    """All methods, plugins included."""
    return names("decode")


def _contrast(view: View, alpha: float, beta: float, base: tuple[Op, ...] = (), rule: Op | None = None) -> DecodeSpec:
    """``z_0 + alpha (z_0 - z_1)`` on the plausible tokens."""
    return DecodeSpec(views=(view,), base=base, terms=(Term(1, "contrast", alpha, rule),), masks=_apc(beta))


def _apc(beta: float) -> tuple[Op, ...]:
    mask = op("apc", beta=beta)
    return (mask,) if beta else ()


def _tap(layers: str, select: Select, norm: bool = True) -> Tap:
    check_layers(layers, "decode: layers")
    return Tap(layers, select, norm)


def _media(name: str, **args: Any) -> View:
    return View(media=(op(name, **args),))


@preset("greedy", "nothing is mixed: the model's own hallucinations stay")
def greedy() -> DecodeSpec:
    """The best token of z_0 at each step."""
    return DecodeSpec()


@preset("sample", "answers of one word: draws wrong ones as often as the model doubts")
def sample() -> DecodeSpec:
    """A draw from softmax(z_0 / temperature), cut by top_k, top_p, min_p."""
    return DecodeSpec(temperature=1.0)


@preset("apc", "a control: what the plausibility mask does without any contrast")
def apc(beta: float = 0.1) -> DecodeSpec:
    """Adaptive plausibility alone (Li et al. 2022, arXiv 2210.15097): tokens with p_0 >= beta max p_0.

    At temperature 1 it is min-p sampling; taking the best token it is greedy.
    """
    return DecodeSpec(masks=_apc(beta))


@preset("vcd", "counting and small print; at step 500 the noised picture still shows most of what is there")
def vcd(alpha: float = 1.0, beta: float = 0.1, step: int = 500) -> DecodeSpec:
    """Visual contrastive decoding (Leng et al. 2023, arXiv 2311.16922): (1 + alpha) z_0 - alpha z_noised."""
    return _contrast(_media("diffuse", step=step), alpha, beta)


@preset("contrast", "depends on the view")
def contrast(view: str = "blank", alpha: float = 1.0, beta: float = 0.1) -> DecodeSpec:
    """(1 + alpha) z_0 - alpha z_view, for any view of the media."""
    if view not in CONTRAST_VIEWS:
        raise unknown("view", view, CONTRAST_VIEWS, "decode contrast")
    return _contrast(_media(view), alpha, beta)


@preset("blank", "needs a model that guesses from text when it sees nothing")
def blank(alpha: float = 1.0, beta: float = 0.1, fill: str = "mean") -> DecodeSpec:
    """(1 + alpha) z_0 - alpha z_blank: one even colour, or silence, in the place of the media."""
    return _contrast(_media("blank", fill=fill), alpha, beta)


@preset("no_image", "the text-only row stands at other positions than the model was trained with")
def no_image(alpha: float = 1.0, beta: float = 0.1) -> DecodeSpec:
    """(1 + alpha) z_0 - alpha z_text: the same prompt without its media (classifier-free guidance)."""
    return _contrast(_media("drop"), alpha, beta)


@preset("patch_shuffle", "a model that reads patches as a bag sees nearly the same picture")
def patch_shuffle(alpha: float = 1.0, beta: float = 0.1, grid: int = 4) -> DecodeSpec:
    """(1 + alpha) z_0 - alpha z_shuffled: the picture's tiles, or the sound's pieces, in random order."""
    return _contrast(_media("patch_shuffle", grid=grid), alpha, beta)


@preset("silence", "sounds only")
def silence(alpha: float = 1.0, beta: float = 0.1) -> DecodeSpec:
    """(1 + alpha) z_0 - alpha z_silence, for sounds."""
    return _contrast(_media("silence"), alpha, beta)


@preset("audio_noise", "sounds only; at a high ratio the noised sound is still understood")
def audio_noise(alpha: float = 1.0, beta: float = 0.1, snr: float = 0.0) -> DecodeSpec:
    """(1 + alpha) z_0 - alpha z_noisy: VCD for sounds, white noise at a signal-to-noise ratio in dB."""
    return _contrast(_media("noise", snr=snr), alpha, beta)


@preset("time_reverse", "sounds only; steady sounds are the same backwards")
def time_reverse(alpha: float = 1.0, beta: float = 0.1) -> DecodeSpec:
    """(1 + alpha) z_0 - alpha z_backwards, for sounds."""
    return _contrast(_media("time_reverse"), alpha, beta)


@preset("icd", "a model tuned without system prompts ignores the disturbance")
def icd(
    alpha: float = 1.0,
    beta: float = 0.1,
    where: str = "system",
    text: str = "You are confused and describe things that are not there.",
) -> DecodeSpec:
    """Instruction contrastive decoding (Wang et al. 2024, arXiv 2403.18715): (1 + alpha) z_0 - alpha z_disturbed.

    ``where`` puts the disturbing words into the system prompt, before the question (prefix) or behind the media
    (after_media).
    """
    places = ("system", "prefix", "after_media")
    if where not in places:
        raise unknown("place", where, places, "decode icd")
    return _contrast(View(text=(op(where, text=text),)), alpha, beta)


@preset("m3id", "one-word answers: the weight is next to nothing at the first token")
def m3id(
    rate: float = 0.02, start: int = 1, clip: float = 3.0, tau: float = 1.0, alpha: float = 1.0, beta: float = 0.1
) -> DecodeSpec:
    """M3ID (Favero et al. 2024, arXiv 2403.14003): z_0 + alpha (exp(rate t) - 1) (z_0 - z_text).

    t counts tokens from ``start``; steps where the model is surer than ``tau`` are left alone.
    """
    return _contrast(_media("drop"), alpha, beta, rule=op("growth", rate=rate, start=start, clip=clip, tau=tau))


@preset("code", "costs a whole description first; what that gets wrong is contrasted away too")
def code(max_new_tokens: int = 48, question: str = "What is in the picture?") -> DecodeSpec:
    """CODE (Kim et al. 2024, arXiv 2406.01920): z_0 + (1 - D) (z_0 - z_described), tokens with p_0 >= D max p_0.

    The model describes the media first; the view has the description in their place. D in 0..1 is the divergence of
    the two distributions.
    """
    view = View(text=(op("caption", question=question, max_new_tokens=max_new_tokens),))
    terms = (Term(1, "contrast", 1.0, op("closeness")),)
    return DecodeSpec(views=(view,), terms=terms, masks=(op("agreement", view=1),))


@preset("ritual", "left, right, above, boxes and writing: flips, rotations and crops change them")
def ritual(alpha: float = 3.0, beta: float = 0.1, transform: str = "random") -> DecodeSpec:
    """RITUAL (Woo et al. 2024, arXiv 2405.17821): z_0 + alpha z_transformed; the gain is 1 + alpha.

    ``transform`` is hflip, vflip, rotate, jitter, blur, crop, identity, or random: one of the first six, drawn for
    each request. ``normalize=true`` divides by the gain, which takes the sharpening away and leaves the averaging.
    """
    valid = (*RITUAL_TRANSFORMS, "random", "identity")
    if transform not in valid:
        raise unknown("transform", transform, valid, "decode ritual")
    return DecodeSpec(views=(_media(transform),), terms=(Term(1, "add", alpha),), masks=_apc(beta))


@preset("avisc", "reads attention: one more prefill; a model without blind tokens gives it nothing to remove")
def avisc(alpha: float = 1.0, beta: float = 0.1, gamma: float = 0.5, deviations: float = 1.0) -> DecodeSpec:
    """AvisC (Woo et al. 2024, arXiv 2405.17820): (1 + alpha) z_0 - alpha z_blind.

    The view keeps only the over-attended ("blind") media tokens, those above mean + deviations * std of the attention
    in the layers that look at the media most (together ``gamma`` of it); the others are zero.
    """
    return _contrast(View(model=(op("blind", gamma=gamma, deviations=deviations),)), alpha, beta)


@preset("sid", "pictures of few tokens: little is left to be pruned")
def sid(alpha: float = 0.5, beta: float = 0.1, keep: float = 0.17, from_layer: int = 2) -> DecodeSpec:
    """Self-introspective decoding (Huo et al. 2024, arXiv 2408.02032): (1 + alpha) z_0 - alpha z_pruned.

    From layer ``from_layer`` on the view sees only the least attended share ``keep`` of the media tokens, chosen anew
    at each step (the paper keeps 100 of 576).
    """
    return _contrast(View(model=(op("prune", keep=keep, from_layer=from_layer),)), alpha, beta)


@preset("pai", "a large boost makes the model repeat what is in the picture")
def pai(alpha: float = 0.5, gamma: float = 1.1, beta: float = 0.1, layers: str = str(LAYERS.default)) -> DecodeSpec:
    """PAI (Liu et al. 2024, arXiv 2407.21771): gamma z_boosted - (gamma - 1) z_text.

    In ``layers`` the predicting token's attention scores on the media grow by alpha times their size.
    """
    base = (op("boost", alpha=alpha, layers=layers),) if alpha else ()
    return _contrast(_media("drop"), gamma - 1, beta, base)


@preset("dola", "small models: early layers are no amateur of the last; ties on the plausible tokens when they agree")
def dola(layers: str = "high", beta: float = 0.1, norm: bool = True) -> DecodeSpec:
    """DoLa (Chuang et al. 2023, arXiv 2309.03883): log p_last - log p_early; the gain is 0.

    For each request and step the early layer is the one of ``layers`` with the largest Jensen-Shannon divergence from
    the last. ``norm=false`` skips the final norm on early layers, as the released code does.
    """
    return DecodeSpec(terms=(Term(_tap(layers, "divergent", norm), "add", -1.0),), masks=_apc(beta))


@preset("deco", "layer range found on 32-layer models; here it is a share of the depth")
def deco(alpha: float = 0.6, layers: str = "0.625:0.875", top_k: int = 20, top_p: float = 0.9) -> DecodeSpec:
    """DeCo (Wang et al. 2024, arXiv 2410.11779): z_0 + alpha p* z_early, on the candidates only.

    Candidates are the ``top_k`` likeliest tokens inside the ``top_p`` nucleus; the early layer is the one that gives
    a candidate the highest probability, and p* is that probability. The gain is 1 + alpha p*.
    """
    term = Term(_tap(layers, "likeliest"), "add", alpha, op("probability"))
    return DecodeSpec(terms=(term,), masks=(op("nucleus", top_k=top_k, top_p=top_p),))


@preset("vti", "needs directions made for this very model (mmllm decode directions)")
def vti(vectors: str = "", scale: float = 0.08) -> DecodeSpec:
    """VTI (Liu et al. 2024, arXiv 2410.15778): directions from hallucinated to right answers behind every MLP.

    x becomes |x| norm(norm(x) + scale norm(d)) in every layer; ``vectors`` is a safetensors file [layers, width].
    """
    return DecodeSpec(base=(op("steer", vectors=vectors, scale=scale),))


@preset("vista", "one more pair of prefills; long answers drift when the scale is large")
def vista(scale: float = 0.05, gamma: float = 0.3, layers: str = "0.78:0.94") -> DecodeSpec:
    """VISTA (Li et al. 2025, arXiv 2502.03628): steering by what the media change, and (1 - gamma) z_0 + gamma z_late.

    The direction of a layer is its state at the last prompt token with the media minus the one without; z_late is the
    mean of the logits of ``layers``.
    """
    base = (op("steer_image", scale=scale),) if scale else ()
    return DecodeSpec(base=base, terms=(Term(_tap(layers, "mean"), "contrast", -gamma),))
