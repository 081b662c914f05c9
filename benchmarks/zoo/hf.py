"""Models of transformers with tiny random configurations: two layers, 32 channels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.timm_models import import_timm
from benchmarks.zoo.registry import Draw, add, flags, ids
from edgec.errors import EdgecError

VOCABULARY = 100
LENGTH = 12
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
DECODER = {
    **TEXT,
    "num_key_value_heads": 2,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


def import_transformers() -> Any:
    """Raises EdgecError when it, or timm, is not installed."""
    # It imports torchvision where there is one, which works once timm has been imported this way.
    import_timm()
    try:
        import transformers
    except ImportError as error:
        raise EdgecError(f"cannot be imported ({error})", where="transformers", hint="make peers") from error
    transformers.logging.set_verbosity_error()
    return transformers


class Plain(nn.Module):
    """The tensors of a model's result that have the given names, in order, as a tuple (or the tensor, for one)."""

    def __init__(self, model: nn.Module, arguments: tuple[str, ...], results: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.arguments = arguments
        self.results = results

    def forward(self, *inputs: torch.Tensor) -> Any:
        found = self.model(**dict(zip(self.arguments, inputs, strict=True)))
        if isinstance(found, torch.Tensor):
            return found
        chosen = tuple(getattr(found, name) for name in self.results)
        return chosen[0] if len(chosen) == 1 else chosen


def make(
    model: str, config: str, options: dict[str, Any], arguments: tuple[str, ...], results: tuple[str, ...], part: str
) -> nn.Module:
    """A model of transformers, or its attribute `part`, from a configuration."""
    library = import_transformers()
    made = getattr(library, model)(getattr(library, config)(**options))
    for each in filter(None, part.split(".")):
        made = getattr(made, each)
    return Plain(made, arguments, results)


def _hf(
    name: str,
    model: str,
    config: str,
    options: dict[str, Any],
    inputs: dict[str, Draw | tuple[int, ...]],
    results: str = "last_hidden_state",
    part: str = "",
    family: str = "transformers, text",
    int8: bool = False,
) -> None:
    made: Callable[[], nn.Module] = functools.partial(
        make, model, config, options, tuple(inputs), tuple(results.split()), part
    )
    add(f"hf_{name}", family, made, *inputs.values(), int8=int8)


def _tokens() -> dict[str, Draw | tuple[int, ...]]:
    return {"input_ids": ids(VOCABULARY, 1, LENGTH)}


def _masked() -> dict[str, Draw | tuple[int, ...]]:
    def mask(generator: torch.Generator) -> torch.Tensor:
        return flags(1, LENGTH)(generator).long()

    return {**_tokens(), "attention_mask": mask}


def _pixels(size: int = 32) -> dict[str, Draw | tuple[int, ...]]:
    return {"pixel_values": (1, 3, size, size)}


# -- encoders of text --------------------------------------------------------------------------------------------------

_hf("bert", "BertModel", "BertConfig", TEXT, _tokens(), "last_hidden_state pooler_output")
_hf("bert_masked", "BertForTokenClassification", "BertConfig", TEXT, _masked(), "logits")
_hf("roberta", "RobertaModel", "RobertaConfig", TEXT, _tokens())
_hf("albert", "AlbertModel", "AlbertConfig", {**TEXT, "embedding_size": 16}, _tokens())
_hf("electra", "ElectraModel", "ElectraConfig", {**TEXT, "embedding_size": 16}, _tokens())
_hf(
    "distilbert",
    "DistilBertModel",
    "DistilBertConfig",
    {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
    _tokens(),
)
_hf(
    "mobilebert",
    "MobileBertModel",
    "MobileBertConfig",
    {**TEXT, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    _tokens(),
)
_hf("squeezebert", "SqueezeBertModel", "SqueezeBertConfig", {**TEXT, "embedding_size": 32}, _tokens())
_hf(
    "deberta_v2",
    "DebertaV2Model",
    "DebertaV2Config",
    {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    _tokens(),
)
_hf(
    "modernbert",
    "ModernBertModel",
    "ModernBertConfig",
    {
        **TEXT,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "global_attn_every_n_layers": 2,
        "local_attention": 4,
    },
    _tokens(),
)
_hf("fnet", "FNetModel", "FNetConfig", TEXT, _tokens())
_hf(
    "convbert",
    "ConvBertModel",
    "ConvBertConfig",
    {**TEXT, "embedding_size": 32, "conv_kernel_size": 5, "head_ratio": 2},
    _tokens(),
)
_hf(
    "t5_encoder",
    "T5EncoderModel",
    "T5Config",
    {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    _tokens(),
)
_hf(
    "t5",
    "T5ForConditionalGeneration",
    "T5Config",
    {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "use_cache": False,
        "decoder_start_token_id": 0,
    },
    {**_tokens(), "decoder_input_ids": ids(VOCABULARY, 1, 5)},
    "logits",
)

# -- decoders ----------------------------------------------------------------------------------------------------------

_hf(
    "gpt2",
    "GPT2LMHeadModel",
    "GPT2Config",
    {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "use_cache": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    _tokens(),
    "logits",
)
_hf("llama", "LlamaForCausalLM", "LlamaConfig", DECODER, _tokens(), "logits")
_hf("mistral", "MistralForCausalLM", "MistralConfig", {**DECODER, "sliding_window": 4}, _tokens(), "logits")
_hf("qwen2", "Qwen2ForCausalLM", "Qwen2Config", DECODER, _tokens(), "logits")
_hf("qwen3", "Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "head_dim": 8}, _tokens(), "logits")
_hf("gemma", "GemmaForCausalLM", "GemmaConfig", {**DECODER, "head_dim": 8}, _tokens(), "logits")
_hf("phi", "PhiForCausalLM", "PhiConfig", DECODER, _tokens(), "logits")
_hf(
    "opt",
    "OPTForCausalLM",
    "OPTConfig",
    {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
        "use_cache": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    _tokens(),
    "logits",
)
_hf(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    "GPTNeoXConfig",
    {**TEXT, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2},
    _tokens(),
    "logits",
)
_hf(
    "bloom",
    "BloomForCausalLM",
    "BloomConfig",
    {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
        "use_cache": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    _tokens(),
    "logits",
)
_hf(
    "mixtral",
    "MixtralForCausalLM",
    "MixtralConfig",
    {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
    _tokens(),
    "logits",
)
_hf(
    "mamba",
    "MambaForCausalLM",
    "MambaConfig",
    {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "use_cache": False},
    _tokens(),
    "logits",
)
_hf(
    "mamba2",
    "Mamba2ForCausalLM",
    "Mamba2Config",
    {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 8,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 1,
        "chunk_size": 4,
        "use_cache": False,
    },
    _tokens(),
    "logits",
)
_hf(
    "rwkv",
    "RwkvForCausalLM",
    "RwkvConfig",
    {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "attention_hidden_size": 32,
        "intermediate_size": 64,
        "use_cache": False,
    },
    _tokens(),
    "logits",
)

# -- images ------------------------------------------------------------------------------------------------------------

_IMAGES = "transformers, images"
_hf("vit", "ViTModel", "ViTConfig", VISION, _pixels(), family=_IMAGES, int8=True)
_hf("deit", "DeiTModel", "DeiTConfig", VISION, _pixels(), family=_IMAGES, int8=True)
_hf("dinov2", "Dinov2Model", "Dinov2Config", {**VISION, "mlp_ratio": 2}, _pixels(), family=_IMAGES, int8=True)
_hf(
    "clip_vision",
    "CLIPVisionModel",
    "CLIPVisionConfig",
    {**VISION, "projection_dim": 32},
    _pixels(),
    "last_hidden_state pooler_output",
    family=_IMAGES,
    int8=True,
)
_hf(
    "siglip_vision",
    "SiglipVisionModel",
    "SiglipVisionConfig",
    VISION,
    _pixels(),
    "last_hidden_state pooler_output",
    family=_IMAGES,
    int8=True,
)
_hf(
    "yolos",
    "YolosForObjectDetection",
    "YolosConfig",
    {**VISION, "image_size": [32, 32], "num_detection_tokens": 5},
    _pixels(),
    "logits pred_boxes",
    family=_IMAGES,
)
_hf("dpt_vit_msn", "ViTMSNModel", "ViTMSNConfig", VISION, _pixels(), family=_IMAGES)
_hf(
    "segformer",
    "SegformerForSemanticSegmentation",
    "SegformerConfig",
    {
        "hidden_sizes": [16, 24, 32, 40],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 4],
        "decoder_hidden_size": 16,
        "num_labels": 5,
    },
    _pixels(64),
    "logits",
    family=_IMAGES,
    int8=True,
)
_hf(
    "mobilevit",
    "MobileViTForImageClassification",
    "MobileViTConfig",
    {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 12, 16, 20, 24, 64], "num_labels": 5},
    _pixels(64),
    "logits",
    family=_IMAGES,
    int8=True,
)
_hf(
    "mobilenet_v2",
    "MobileNetV2ForImageClassification",
    "MobileNetV2Config",
    {"depth_multiplier": 0.35, "image_size": 64, "num_labels": 5},
    _pixels(64),
    "logits",
    family=_IMAGES,
    int8=True,
)
_hf(
    "levit",
    "LevitModel",
    "LevitConfig",
    {
        "image_size": 64,
        "hidden_sizes": [16, 24, 32],
        "num_attention_heads": [2, 3, 4],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
        "mlp_ratio": [2, 2, 2],
        "attention_ratio": [2, 2, 2],
        "down_ops": [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 3, 4, 2, 2]],
    },
    _pixels(64),
    family=_IMAGES,
)
_hf(
    "pvt",
    "PvtModel",
    "PvtConfig",
    {
        "image_size": 64,
        "hidden_sizes": [8, 16, 16, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 4],
        "mlp_ratios": [2, 2, 2, 2],
    },
    _pixels(64),
    family=_IMAGES,
)
_hf(
    "poolformer",
    "PoolFormerModel",
    "PoolFormerConfig",
    {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_encoder_blocks": 4},
    _pixels(64),
    family=_IMAGES,
    int8=True,
)
_hf(
    "swin2sr",
    "Swin2SRForImageSuperResolution",
    "Swin2SRConfig",
    {"image_size": 16, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4, "upscale": 2},
    _pixels(16),
    "reconstruction",
    family=_IMAGES,
)
_hf(
    "depth_anything",
    "DepthAnythingForDepthEstimation",
    "DepthAnythingConfig",
    {"backbone_config": None, "backbone": None},
    _pixels(56),
    "predicted_depth",
    family=_IMAGES,
)

# -- sound, time series and several kinds of input ---------------------------------------------------------------------

_SOUND = "transformers, sound and other"
_WHISPER = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_source_positions": 50,
    "num_mel_bins": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "use_cache": False,
}
_hf(
    "whisper_encoder",
    "WhisperModel",
    "WhisperConfig",
    _WHISPER,
    {"input_features": (1, 20, 100)},
    part="encoder",
    family=_SOUND,
)
_hf(
    "whisper",
    "WhisperForConditionalGeneration",
    "WhisperConfig",
    _WHISPER,
    {"input_features": (1, 20, 100), "decoder_input_ids": ids(VOCABULARY, 1, 6)},
    "logits",
    family=_SOUND,
)
_WAV2VEC = {
    "vocab_size": 30,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [16, 16, 16],
    "conv_stride": [5, 4, 2],
    "conv_kernel": [10, 8, 4],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
_hf("wav2vec2", "Wav2Vec2ForCTC", "Wav2Vec2Config", _WAV2VEC, {"input_values": (1, 1600)}, "logits", family=_SOUND)
_hf("hubert", "HubertModel", "HubertConfig", _WAV2VEC, {"input_values": (1, 1600)}, family=_SOUND)
_hf(
    "ast",
    "ASTModel",
    "ASTConfig",
    {**TEXT, "patch_size": 8, "max_length": 32, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8},
    {"input_values": (1, 32, 16)},
    family=_SOUND,
)
_hf(
    "patchtst",
    "PatchTSTForPrediction",
    "PatchTSTConfig",
    {
        "num_input_channels": 3,
        "context_length": 32,
        "prediction_length": 8,
        "patch_length": 8,
        "patch_stride": 8,
        "d_model": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "ffn_dim": 32,
        "use_cls_token": False,
    },
    {"past_values": (1, 32, 3)},
    "prediction_outputs",
    family=_SOUND,
)
_hf(
    "patchtsmixer",
    "PatchTSMixerForPrediction",
    "PatchTSMixerConfig",
    {
        "num_input_channels": 3,
        "context_length": 32,
        "prediction_length": 8,
        "patch_length": 8,
        "patch_stride": 8,
        "d_model": 16,
        "num_layers": 2,
    },
    {"past_values": (1, 32, 3)},
    "prediction_outputs",
    family=_SOUND,
)
_hf(
    "clip",
    "CLIPModel",
    "CLIPConfig",
    {
        "text_config": {**TEXT, "eos_token_id": 2, "projection_dim": 16},
        "vision_config": {**VISION, "projection_dim": 16},
        "projection_dim": 16,
    },
    {**_tokens(), **_pixels()},
    "text_embeds image_embeds",
    family=_SOUND,
)
_hf(
    "encodec",
    "EncodecModel",
    "EncodecConfig",
    {
        "sampling_rate": 24000,
        "num_filters": 4,
        "hidden_size": 16,
        "upsampling_ratios": [4, 2],
        "num_lstm_layers": 1,
        "codebook_size": 16,
        "codebook_dim": 16,
    },
    {"hidden_states": (1, 1, 320)},
    part="encoder",
    family=_SOUND,
)
_hf(
    "detr_decision",
    "DecisionTransformerModel",
    "DecisionTransformerConfig",
    {"state_dim": 4, "act_dim": 2, "hidden_size": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "max_ep_len": 32},
    {
        "states": (1, 5, 4),
        "actions": (1, 5, 2),
        "rewards": (1, 5, 1),
        "returns_to_go": (1, 5, 1),
        "timesteps": ids(32, 1, 5),
        "attention_mask": lambda g: torch.ones(1, 5, dtype=torch.int64),
    },
    "state_preds action_preds",
    family=_SOUND,
)
