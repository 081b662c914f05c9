"""Networks of timm, one or more of each family, at the smallest input that they take."""

from __future__ import annotations

import functools

from torch import nn

from benchmarks.timm_models import import_timm
from benchmarks.zoo.registry import add

CLASSES = 100
# name:size; with `*` the network is built for that size, otherwise it takes any.
CONVOLUTIONAL = """
mobilenetv1_100:64 mobilenetv2_100:64 mobilenetv3_small_100:64 mobilenetv4_conv_small:64 ghostnet_100:64
ghostnetv2_100:64 ghostnetv3_100:64 repghostnet_100:64 tinynet_a:64 tinynet_e:64 efficientnet_lite0:64
efficientnet_b0:64 mnasnet_small:64 hardcorenas_a:64 lcnet_050:64 rexnet_100:64 mixnet_s:64 fbnetc_100:64
semnasnet_075:64 spnasnet_100:64 resnet18:64 resnet26:64 resnext26ts:64 seresnext26ts:64 gcresnext26ts:64 skresnet18:64
dla34:64 dla60_res2net:64 dpn48b:64 selecsls42:64 cs3darknet_s:64 cspresnet50:64 ese_vovnet19b_dw:64 regnetx_002:64
regnety_002:64 densenet121:64 hgnetv2_b0:64 repvgg_a0:64 mobileone_s0:64 repvit_m0_9:64 fastvit_t8:64 fasternet_t0:64
starnet_s1:64 convnext_atto:64 convnextv2_atto:64 inception_next_atto:64 mambaout_femto:64 convmixer_768_32:64
shvit_s1:64 poolformer_s12:64 lambda_resnet26t:128 eca_resnet33ts:64 nf_regnet_b0:64 vgg11:64 inception_v3:96
xception41:64 tresnet_m:64 hrnet_w18_small:64 test_resnet:64 test_efficientnet:64 nfnet_l0:64 csatv2:64
resnest14d:64 legacy_seresnet18:64 legacy_xception:96 inception_v4:96 inception_resnet_v2:96 cspnext_tiny:64 dpn68b:64
rdnet_tiny:64 resnetv2_18:64 resnetv2_50d_evos:64 resnetv2_50d_frn:64 resnetv2_50x1_bit:64 res2net50_26w_4s:64
res2next50:64 hgnet_tiny:64 lcnetv2_small:64 cpubone_nano:64 convnext_atto_rms:64 tf_efficientnet_lite0:64
tf_mobilenetv3_large_minimal_100:64 efficientnet_es:64 tf_efficientnetv2_b0:64 mobilenet_edgetpu_100:64 nasnetalarge:96
"""
ATTENTION = """
mobilenetv4_hybrid_medium:128 edgenext_xx_small:64 mobilevit_xxs:64 mobilevitv2_050:64 efficientformer_l1:224
efficientformerv2_s0:224 efficientvit_b0:64 efficientvit_m0:224 tiny_vit_5m_224:224 levit_128s:224
deit_tiny_patch16_224:64* vit_tiny_patch16_224:64* eva02_tiny_patch14_224:56* swin_tiny_patch4_window7_224:224
swinv2_cr_tiny_ns_224:224 maxvit_rmlp_pico_rw_256:256 pvt_v2_b0:64 mixer_s32_224:64* gmlp_ti16_224:64*
resmlp_12_224:64* xcit_nano_12_p16_224:64 coat_lite_tiny:224 visformer_tiny:224 crossvit_tiny_240:240
tnt_s_patch16_224:64* volo_d1_224:64* convit_tiny:64* hiera_tiny_224:224 nextvit_small:64 caformer_s18:64
swiftformer_xs:64 halonet26t:256 botnet26t_256:256 mvitv2_tiny:224 twins_svt_small:224 cait_xxs24_224:64*
pit_ti_224:224 sequencer2d_s:64* nest_tiny:224 coatnet_nano_rw_224:224 davit_tiny:224 focalnet_tiny_srf:64
gcvit_xxtiny:224 beit_base_patch16_224:64* vit_relpos_small_patch16_224:64* flexivit_small:64* test_vit:64*
efficientvim_m1:224 iformer_t:224 lowformer_b0:224 coat_tiny:224 vitamin_small_224:224 samvit_base_patch16_224:224
sam2_hiera_tiny:224 vit_tiny_r_s16_p8_224:64* swinv2_tiny_window8_256:256 naflexvit_base_patch16_gap:64
deit_tiny_distilled_patch16_224:64* halo2botnet50ts_256:256 vit_small_patch16_dinov3:64 test_vit_relpos:64*
qwen3_vit_88m:64 gemma4_vit_167m:64 mobilenetv5_base:128
"""


def make(name: str, size: int | None) -> nn.Module:
    """A network with random weights; built for images of `size` pixels, or for any. Raises EdgecError without timm."""
    timm = import_timm()
    options = {} if size is None else {"img_size": size}
    return timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)


def _register(text: str, family: str) -> None:
    for each in text.split():
        name, _, size = each.partition(":")
        fixed = size.endswith("*")
        pixels = int(size.rstrip("*"))
        add(name, family, functools.partial(make, name, pixels if fixed else None), (1, 3, pixels, pixels), int8=True)


_register(CONVOLUTIONAL, "timm, convolutional")
_register(ATTENTION, "timm, attention")
