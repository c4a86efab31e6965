"""The networks of the benchmark ``structure_zoo.py``, with random weights, by library."""

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import segmentation_models_pytorch
import timm
import torch
import torch_geometric.nn as geometric
import transformers
import ultralytics
from monai.networks import nets
from torch import nn
from transformers.models.auto import modeling_auto

from prunegraph.graph import call_forward

Case = tuple[nn.Module, Any]
"""A network and its example inputs: a tensor, a tuple, or keyword arguments."""

OUTPUTS = ("logits", "prediction_logits", "reconstruction", "predicted_depth")


class Answers(nn.Module):
    """Returns one output of a network that returns a record: what its user reads.

    Args:
        network: what is wrapped.
        name: of the output.
    """

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.network, self.name = network, name

    def forward(self, **inputs: Any) -> Any:
        """Return the output."""
        return getattr(self.network(**inputs), self.name)


# timm: the smallest network of every file of models, the giants left out

TIMM = """
beit_base_patch16_224 halonet26t test_byobnet cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32
test_convnext cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny
deit_tiny_patch16_224 densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1
efficientformerv2_s0 test_efficientnet efficientvim_m1 efficientvit_b0 efficientvit_m0
vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny ghostnet_050
hardcorenas_b hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t
inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s
lowformer_b0 test_mambaout test_coatnet poolformerv2_s12 gmlp_ti16_224 mobilenetv3_small_050
mobilevit_xxs mvitv2_tiny nest_tiny nextvit_small test_nfnet pit_ti_224 pvt_v2_b0 rdnet_tiny
regnetx_002 repghostnet_050 repvit_m1 res2next50 resnest14d test_resnet resnetv2_18 rexnet_100
selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs
swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224
tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny test_vit
vit_tiny_r_s16_p8_224 test_vit_relpos vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw
legacy_xception xception41p xcit_nano_12_p8_224
""".split()  # noqa: SIM905 - names to be read


def _timm(name: str) -> Case:
    model = timm.create_model(name, pretrained=False, num_classes=10)
    size = model.default_cfg["input_size"]
    fixed = name == "halonet26t" or model.default_cfg.get("fixed_input_size", False)
    if size[1] >= 160 and not fixed:
        size = (3, 128, 128)
    return model, torch.randn(1, *size)


# transformers: one small network of each kind, for classification where there is one

TRANSFORMERS = """
afmoe aimv2 aimv2_vision_model albert altclip apertus apertus1p5_text arcee aria_text
audio-spectrogram-transformer audioflamingo3 bailing_hybrid bamba bart beam beit bert
bert-generation big_bird bigbird_pegasus biogpt bit bitnet blenderbot blenderbot-small blip bloom
bridgetower camembert canine chinese_clip chinese_clip_vision_model clip clip_text_model
clip_vision_model clipseg codegen cohere cohere2 cohere2_moe conditional_detr convbert convnext
convnextv2 cpmant ctrl cvt cwm dab-detr data2vec-audio data2vec-text data2vec-vision deberta
deberta-v2 deepseek_v4 deformable_detr deit detr diffllama dinov2 dinov2_with_registers
dinov3_convnext dinov3_vit distilbert doge dory dpr electra encoder-decoder ernie ernie4_5
ernie4_5_moe eurobert evolla exaone exaone4 exaone_moe falcon falcon_h1 falcon_mamba
fastspeech2_conformer flaubert flex_olmo flint fnet focalnet fsmt funnel gemma gemma2 gemma3_text
git glm glm4 glm4_moe glmasr glpn gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese
gpt_oss gptj granite granite_docling_text granite_docling_vision granite_speech granite_speech_plus
granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared groupvit gte helium hgnet_v2
hiera higgs_audio_v2 hrm_text hy_v3 hy_v4 hy_v4_vl_text hyperclovax ibert idefics3_vision ijepa
imagegpt inkling2_loop_text inkling2_text inkling_text internlm3 internvl_vision iquestcoder jais2
jamba jetmoe jina_embeddings_v3 kimi_linear kolibri1 kosmos-2.5 laguna lara_mini layoutlm led levit
lfm2 lfm3 llama llama4_text longformer longt5 m2m_100 mamba mamba2 marian markuplm mask2former mbart
megatron-bert mellum metaclip_2 mimo_v2_flash minicpm_ocr minicpmv4_6 minicpmv4_7 minimax minimax_m2
minimax_m3_vl_text ministral3 mistral mixtral mlcd mlcd_vision_model mllama mobilebert mobilenet_v1
mobilenet_v2 mobilevit mobilevitv2 modernbert modernbert-decoder molmo2_text moshi
moss_transcribe_diarize mpnet mpt mra mt5 muse_glimmer_text muse_spark_text mvp nanochat nemotron_h
nllb-moe nomic_bert nystromformer olmo olmo2 olmo3 olmo_hybrid olmoe omniasr openai-gpt
openai_privacy_filter opt owlv2 owlvit pegasus pegasus_x persimmon phi phi3 phi4_multimodal phimoe
pixio pixtral plbart poolformer pp_lcnet pp_ocrv5_mobile_det pp_ocrv5_server_rec pp_ocrv6_small_rec
pp_ocrv6_tiny_rec prophetnet pvt pvt_v2 qianfan_ocr_vision qwen2 qwen2_audio qwen2_moe qwen3
qwen3_5_moe_text qwen3_5_text qwen3_asr qwen3_moe qwen3_next qwen3_vl_moe_text qwen3_vl_text
qwen4_exp_text radio recurrent_gemma regnet rembert resnet roberta roberta-prelayernorm roc_bert
roformer rwkv sam2_vision_model sam3_lite_text_text_model sam3_vit_model sam_hq_vision_model
sam_vision_model sarvam_moe seamless_m4t seamless_m4t_v2 seed_oss segformer siglip
siglip_vision_model smollm3 smolvlm_vision solar_open splinter squeezebert stablelm starcoder2
swiftformer swinv2 switch_transformers t5 t5gemma table-transformer tapas textnet timesformer
timm_wrapper tipsv2 tipsv2_text_model tipsv2_vision_model trocr ultrabert umt5 upernet vaultgemma
videomae vilt vision-text-dual-encoder visual_bert vit vit_mae vit_msn vitdet vits vivit vjepa2
voxtral whisper xglm xlm xlm-roberta xlm-roberta-xl xlnet xlstm yolos yoso
""".split()  # noqa: SIM905 - names to be read

SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts"), 4),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "hidden_dim", "n_inner"), 128),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "vocab_size"), 128),
    **dict.fromkeys(("head_dim", "d_kv", "num_mel_bins"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "moe_intermediate_size"), 64),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "eos_token_id"), 2),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id"), 1),
    **dict.fromkeys(("max_source_positions", "max_target_positions"), 64),
    "pad_token_id": 0,
    "use_cache": False,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}
STAGES = ("depths", "hidden_sizes", "embed_dims", "dims", "layers")
"""A configuration with one of these has stages of its own widths, which stay."""

SIZES: dict[str, dict[str, Any]] = {
    "funnel": {"block_sizes": [2, 2], "d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 128},
    "gpt_neo": {
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "hidden_size": 64,
        "num_heads": 4,
        "max_position_embeddings": 64,
    },
    "mamba2": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 16,
        "n_groups": 2,
        "state_size": 16,
        "use_cache": False,
    },
    "prophetnet": {
        "hidden_size": 64,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
        "max_position_embeddings": 64,
        "use_cache": False,
    },
    "xlnet": {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128},
}
"""Kinds whose sizes are not to be found by name."""

MORE: dict[str, dict[str, Any]] = {
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "falcon": {"head_dim": None},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16},
}
OWN_SIZES = {"convnext", "convnextv2", "hiera", "levit", "mobilevit", "mobilevitv2", "swinv2"}
SIDE, FRAMES, TOKENS = 64, 8, 12


def _sizes(kind: str, config: Any) -> dict[str, Any]:
    """Return what makes a configuration small."""
    if kind in SIZES:
        return SIZES[kind] | {"vocab_size": 128}
    found = {
        name: value
        for name, value in SMALL.items()
        if isinstance(getattr(config, name, None), int | bool)
    }
    if kind in OWN_SIZES or any(isinstance(getattr(config, s, None), list) for s in STAGES):
        kept = ("vocab_size", "num_labels", "use_cache", "pad_token_id")
        found = {name: value for name, value in found.items() if name in kept}
        if hasattr(config, "image_size"):
            one = isinstance(config.image_size, int)
            found["image_size"] = SIDE if one else [SIDE] * len(config.image_size)
    found |= MORE.get(kind, {})
    return {name: value for name, value in found.items() if value is not None}


def _network(kind: str, config: Any) -> nn.Module:
    """Make the network of a configuration that has something to answer."""
    auto = modeling_auto
    names = [
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,
        auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
        auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES,
        auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_MAPPING_NAMES,
    ]
    if getattr(config, "is_encoder_decoder", False):
        names.insert(0, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
    name = next(mapping[kind] for mapping in names if kind in mapping)
    network: nn.Module = getattr(transformers, name if isinstance(name, str) else name[0])(config)
    return network.eval()


def _inputs(kind: str, network: Any) -> dict[str, Any]:
    """Return the keyword arguments that a network of transformers needs."""
    config, tokens = network.config, torch.randint(3, 100, (1, TOKENS))
    takes = inspect.signature(network.forward).parameters
    inner = getattr(config, "vision_config", config)
    size = getattr(inner, "image_size", None) or SIDE
    side = max(size if isinstance(size, int) else size[0], 32)
    image = torch.randn(1, getattr(config, "num_channels", 3), side, side)
    inputs: dict[str, Any] = {}
    if "input_ids" in takes:
        inputs["input_ids"] = tokens
    if "decoder_input_ids" in takes and config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens[:, :8]
    if "pixel_values" in takes and kind != "git":
        inputs["pixel_values"] = image
    if kind in {"videomae", "vivit", "timesformer"}:
        inputs = {"pixel_values": torch.randn(1, config.num_frames, 3, side, side)}
    if kind == "vjepa2":
        inputs = {"pixel_values_videos": torch.randn(1, FRAMES, 3, side, side)}
    if "input_values" in takes and not inputs:
        waves = kind == "data2vec-audio"
        spectrum = (1, 4000) if waves else (1, config.max_length, config.num_mel_bins)
        inputs["input_values"] = torch.randn(spectrum)
    return inputs | ({"use_cache": False} if "use_cache" in takes else {})


def _transformers(kind: str) -> Case:
    make = transformers.CONFIG_MAPPING[kind]
    plain = make()
    parts = {
        name: _sizes(kind, getattr(plain, name))
        for name in getattr(plain, "sub_configs", {})
        if getattr(plain, name, None) is not None and name != "backbone_config"
    }
    network = _network(kind, make(**_sizes(kind, plain), **parts))
    inputs = _inputs(kind, network)
    with torch.no_grad():
        answer = network(**inputs)
    name = next((name for name in OUTPUTS if getattr(answer, name, None) is not None), None)
    return (network if name is None else Answers(network, name)), inputs


# segmentation_models_pytorch: every decoder on one encoder, and many encoders under a U-Net

SEGMENTATION = """
Unet/resnet18 UnetPlusPlus/resnet18 MAnet/resnet18 Linknet/resnet18 FPN/resnet18 PSPNet/resnet18
DeepLabV3/resnet18 DeepLabV3Plus/resnet18 PAN/resnet18 UPerNet/resnet18 Segformer/mit_b0
DPT/tu-vit_tiny_patch16_224 Unet/mobilenet_v2 Unet/efficientnet-b0 Unet/mit_b0 Unet/densenet121
Unet/vgg11_bn Unet/xception Unet/timm-regnetx_002 Unet/mobileone_s0 Unet/resnext50_32x4d
Unet/se_resnet50 Unet/dpn68b Unet/inceptionv4
""".split()  # noqa: SIM905 - names to be read


def _segmentation(name: str) -> Case:
    decoder, encoder = name.split("/")
    side = 224 if decoder == "DPT" else 128
    make = getattr(segmentation_models_pytorch, decoder)
    network = make(encoder_name=encoder, encoder_weights=None, classes=2)
    return network, torch.randn(1, 3, side, side)


# ultralytics: detectors, and networks for segments, poses, boxes that are turned, and classes

ULTRALYTICS = """
yolov3-tiny yolov5n yolov6n yolov8n yolov8n-seg yolov8n-pose yolov8n-obb yolov8n-cls yolov8n-p2
yolov8n-ghost yolov8n-world yolov9t yolov10n yolo11n yolo11n-seg yolo11n-cls yolo12n yolo26n
rtdetr-l
""".split()  # noqa: SIM905 - names to be read


def _ultralytics(name: str) -> Case:
    kinds = {"rtdetr-l": ultralytics.RTDETR, "yolov8n-world": ultralytics.YOLOWorld}
    return kinds.get(name, ultralytics.YOLO)(f"{name}.yaml").model, torch.rand(1, 3, 128, 128)


# diffusers and monai: what their users train

DIFFUSERS = (
    "UNet2DModel",
    "UNet2DConditionModel",
    "AutoencoderKL",
    "VQModel",
    "DiTTransformer2DModel",
)
LATENT = torch.randn(1, 4, 16, 16)


def _diffusers(name: str) -> Case:
    step = torch.tensor([3])
    norm = {"norm_num_groups": 8}
    if name == "DiTTransformer2DModel":
        network = diffusers.DiTTransformer2DModel(4, 8, 4, num_layers=2, sample_size=16)
        return network, {"hidden_states": LATENT, "timestep": step, "class_labels": step}
    if name.startswith("UNet"):
        crossed = "Cross" if name == "UNet2DConditionModel" else ""
        network = getattr(diffusers, name)(
            16,
            4,
            4,
            down_block_types=("DownBlock2D", f"{crossed}AttnDownBlock2D"),
            up_block_types=(f"{crossed}AttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(32, 64),
            attention_head_dim=8,
            **(norm | ({"cross_attention_dim": 32} if crossed else {})),
        )
        return network, (LATENT, step, *((torch.randn(1, 7, 32),) if crossed else ()))
    network = getattr(diffusers, name)(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        **norm,
    )
    return network, torch.randn(1, 3, 32, 32)


MONAI: dict[str, tuple[tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {
    "UNet": ((2, 1, 2, (16, 32, 64), (2, 2)), {"num_res_units": 2}, (64, 64)),
    "BasicUNet": ((2, 1, 2), {}, (64, 64)),
    "BasicUNetPlusPlus": ((2, 1, 2), {}, (64, 64)),
    "AttentionUnet": ((2, 1, 2, (16, 32, 64), (2, 2)), {}, (64, 64)),
    "SegResNet": ((2, 8, 1, 2), {}, (64, 64)),
    "SegResNetDS": ((2, 16, 1, 2), {}, (64, 64)),
    "UNETR": (
        (1, 2, (32, 32, 32)),
        {"feature_size": 8, "hidden_size": 48, "mlp_dim": 96, "num_heads": 4},
        (32, 32, 32),
    ),
    "SwinUNETR": ((1, 2), {"feature_size": 12, "spatial_dims": 2}, (64, 64)),
    "VNet": ((3, 1, 2), {}, (32,) * 3),
    "DynUNet": ((2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2]), {"res_block": True}, (64, 64)),
    "HighResNet": ((2, 1, 2), {}, (64, 64)),
    "DenseNet121": ((2, 1, 2), {}, (64, 64)),
    "SEResNet50": ((), {"spatial_dims": 2, "in_channels": 1, "num_classes": 2}, (64, 64)),
    "AutoEncoder": ((2, 1, 1, (8, 16, 32), (2, 2, 2)), {}, (64, 64)),
    "RegUNet": ((2, 1, 8, 2), {}, (64, 64)),
    "DiffusionModelUNet": (
        (2, 1, 1),
        {
            "channels": (32, 64),
            "attention_levels": (False, True),
            "num_res_blocks": 1,
            "num_head_channels": 16,
        },
        (64, 64),
    ),
    "AutoencoderKL": ((2, 1, 1, (1, 1), (32, 64), (False, True), 4), {}, (64, 64)),
}
"""Name -> positional and keyword arguments, size of the image."""


def _monai(name: str) -> Case:
    given, named, size = MONAI[name]
    image = torch.randn(1, 1, *size)
    inputs = (image, torch.tensor([3])) if name == "DiffusionModelUNet" else image
    return getattr(nets, name)(*given, **named), inputs


# torch_geometric: its graph networks, and two layers of every convolution that takes two widths

NETWORKS = ["GCN", "GraphSAGE", "GIN", "GAT", "EdgeCNN"]
CONVOLUTIONS = """
ARMAConv ClusterGCNConv EGConv FeaStConv FiLMConv GATConv GATv2Conv GCNConv GENConv GeneralConv
GraphConv LEConv MFConv ResGatedGraphConv SAGEConv SGConv SSGConv SuperGATConv TAGConv
TransformerConv
""".split()  # noqa: SIM905 - names to be read
NODES, FEATURES, NODE_WIDTH = 24, 12, 32


class Nodes(nn.Module):
    """Two convolutions over a graph, and a class for each node."""

    def __init__(self, make: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = make(FEATURES, NODE_WIDTH), make(NODE_WIDTH, NODE_WIDTH)
        self.last = nn.Linear(NODE_WIDTH, 5)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        x = self.second(self.first(x, edges).relu(), edges).relu()
        out: torch.Tensor = self.last(x)
        return out


def _geometric(name: str) -> Case:
    inputs = torch.randn(NODES, FEATURES), torch.randint(NODES, (2, 80))
    if name in NETWORKS:
        options = {"heads": 4} if name == "GAT" else {}
        make = getattr(geometric.models, name)
        return make(FEATURES, NODE_WIDTH, num_layers=3, out_channels=5, **options), inputs
    options = {"alpha": 0.1} if name == "SSGConv" else {}
    make = getattr(geometric, name)
    return Nodes(lambda width, out: make(width, out, **options)), inputs


LIBRARIES: Mapping[str, tuple[Callable[[str], Case], tuple[str, ...]]] = {
    "timm": (_timm, tuple(TIMM)),
    "transformers": (_transformers, tuple(TRANSFORMERS)),
    "segmentation-models-pytorch": (_segmentation, tuple(SEGMENTATION)),
    "ultralytics": (_ultralytics, tuple(ULTRALYTICS)),
    "diffusers": (_diffusers, DIFFUSERS),
    "monai": (_monai, tuple(MONAI)),
    "torch-geometric": (_geometric, (*NETWORKS, *CONVOLUTIONS)),
}


def build(library: str, name: str) -> Case:
    """Make a network in eval mode, and example inputs.

    Weights that are the same everywhere, as biases of zero, are given noise, small ones are made
    larger, and batch norms have the statistics of the inputs: else a wrong channel could hide, or
    signals vanish.
    """
    torch.manual_seed(0)
    model, inputs = LIBRARIES[library][0](name)
    norms = [m for m in model.eval().modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() > 1:
                _enliven(parameter)
        momentum = [norm.momentum for norm in norms]
        for norm in norms:
            norm.train().momentum = 1.0
        with contextlib.suppress(ValueError):  # one value a channel has no variance
            call_forward(model, inputs)
    for norm, before in zip(norms, momentum, strict=True):
        norm.eval().momentum = before
    return model, inputs


def _enliven(parameter: nn.Parameter) -> None:
    """Give noise to a parameter that is the same everywhere, and a weight its usual size."""
    spread = float(parameter.std())
    if spread == 0:
        parameter.add_(0.1 * torch.randn_like(parameter))
    elif parameter.ndim > 1:
        usual = parameter[0].numel() ** -0.5
        parameter.mul_(max(usual / spread, 1.0))
