"""Architectures of transformers, small and with random weights, each with inputs that it computes its own loss from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fxckpt
from benchmarks.models.cases import own_loss
from benchmarks.models.training import assert_same_step, plain_step, run_step

BATCH, LENGTH, VOCABULARY, WIDTH = 8, 32, 128, 48
LABELS = 5

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 2 * WIDTH,
    "max_position_embeddings": 2 * LENGTH,
}
"""What most configurations call their sizes."""

TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
DECODER = {**TOKENS, "use_cache": False, "num_key_value_heads": 2}
IMAGE = {"image_size": 32, "patch_size": 4, "num_labels": LABELS}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": WIDTH}

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """A model class of transformers, named as it is there: the configuration's changes, and the inputs of a step."""

    name: str
    kind: str
    model: str
    config: dict[str, Any]
    inputs: Callable[[], Inputs]

    def build(self) -> tuple[nn.Module, Inputs]:
        """The model in training mode and the arguments of a call; the same numbers each time."""
        import transformers

        torch.manual_seed(0)
        kind = getattr(transformers, self.model)
        model: nn.Module = kind(kind.config_class(**self.config))
        return model.train(), self.inputs()

    def __repr__(self) -> str:
        return self.name


def step_at(architecture: Architecture, memory_budget: float | int) -> tuple[nn.Module, Inputs]:
    """The optimized model and its inputs, after a training step that was compared with the plain model's.

    Raises:
        AssertionError: loss, gradients, buffers, random-number state or the form of the outputs differ.
        FxckptError: the model can't be captured, or the budget not be reached.
    """
    model, inputs = architecture.build()
    forms = []

    def loss(output: Any) -> Tensor:
        forms.append((type(output), list(output)))
        return own_loss(output)

    expected = plain_step(model, (), inputs, loss)
    optimized = fxckpt.optimize(model, memory_budget, solver="dp", cost_model="estimate")
    assert_same_step(run_step(optimized, (), inputs, loss), expected)
    assert forms[0] == forms[1], f"the output is {forms[1]} instead of {forms[0]}"
    optimized.zero_grad()
    return optimized, inputs


def ids(length: int = LENGTH, batch: int = BATCH) -> Tensor:
    return torch.randint(4, VOCABULARY, (batch, length))


def classes(batch: int = BATCH) -> Tensor:
    return torch.arange(batch) % LABELS


def language() -> Inputs:
    """Rows of different lengths, padded at the end."""
    return padded(ids())


def padded(tokens: Tensor) -> Inputs:
    mask = (torch.arange(LENGTH) < LENGTH - torch.arange(len(tokens))[:, None]).long()
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def sequence_to_sequence() -> Inputs:
    tokens = ids()
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": ids(LENGTH // 2)}


def sequence_classes() -> Inputs:
    return {"input_ids": ids(), "labels": classes()}


def images(size: int = 32) -> Inputs:
    return {"pixel_values": torch.randn(BATCH, 3, size, size), "labels": classes()}


def waves() -> Inputs:
    return {"input_values": torch.randn(BATCH, 1600), "labels": classes()}


def image_and_text(size: int = 32, length: int = 16) -> Inputs:
    return {"input_ids": ids(length), "pixel_values": torch.randn(BATCH, 3, size, size), "return_loss": True}  # type: ignore[dict-item]


def image_in_text(image_token: int, count: int, size: int = 32) -> Inputs:
    """Text with `count` places for the features of an image."""
    tokens = ids()
    tokens[:, 1 : 1 + count] = image_token
    return {**padded(tokens), "pixel_values": torch.randn(BATCH, 3, size, size)}


def decoder(name: str, model: str, kind: str = "text, decoder", **config: Any) -> Architecture:
    return Architecture(name, kind, model, {**SIZES, **DECODER, **config}, language)


def encoder(name: str, model: str, inputs: Callable[[], Inputs] = language, **config: Any) -> Architecture:
    return Architecture(name, "text, encoder", model, {**SIZES, "num_labels": LABELS, **config}, inputs)


def translator(name: str, model: str, **config: Any) -> Architecture:
    sizes = {
        "vocab_size": VOCABULARY,
        "d_model": WIDTH,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 2 * WIDTH,
        "decoder_ffn_dim": 2 * WIDTH,
        "max_position_embeddings": 2 * LENGTH,
        "decoder_start_token_id": 0,
        "use_cache": False,
    }
    return Architecture(
        name,
        "text, encoder-decoder",
        model,
        {**sizes, **TOKENS, "forced_eos_token_id": 1, **config},
        sequence_to_sequence,
    )


def t5(name: str, model: str, **config: Any) -> Architecture:
    sizes = {
        "vocab_size": VOCABULARY,
        "d_model": WIDTH,
        "d_kv": WIDTH // 4,
        "d_ff": 2 * WIDTH,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "use_cache": False,
        "decoder_start_token_id": 0,
    }
    return Architecture(name, "text, encoder-decoder", model, {**sizes, **config}, sequence_to_sequence)


def vision(name: str, model: str, inputs: Callable[[], Inputs] = images, **config: Any) -> Architecture:
    return Architecture(name, "vision", model, {"num_labels": LABELS, **config}, inputs)


def image_encoder(name: str, model: str, **config: Any) -> Architecture:
    return vision(name, model, **{**SIZES, **IMAGE, **config})


def speech(name: str, model: str, **config: Any) -> Architecture:
    sizes = {
        **SIZES,
        "conv_dim": (16, 16),
        "conv_stride": (5, 4),
        "conv_kernel": (10, 4),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "num_labels": LABELS,
        "apply_spec_augment": False,
        "layerdrop": 0.0,
        "classifier_proj_size": 16,
    }
    return Architecture(name, "audio", model, {**sizes, **config}, waves)


def tower(**more: Any) -> dict[str, Any]:
    """Sizes of one of the two encoders of a multimodal model."""
    return {**SIZES, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, **more}


def captions() -> Inputs:
    tokens = ids(16)
    return {"input_ids": tokens, "pixel_values": torch.randn(BATCH, 3, 32, 32), "labels": tokens}


def whisper() -> Inputs:
    return {"input_features": torch.randn(BATCH, 8, 2 * LENGTH), "labels": ids(16)}


def spectrograms() -> Inputs:
    return {"input_values": torch.randn(BATCH, 64, 16), "labels": classes()}


def filter_banks() -> Inputs:
    return {"input_features": torch.randn(BATCH, LENGTH, 16), "labels": ids(16)}


ARCHITECTURES: tuple[Architecture, ...] = (
    decoder("GPT-2", "GPT2LMHeadModel"),
    decoder("GPT-Neo", "GPTNeoForCausalLM", attention_types=[[["global", "local"], 1]], window_size=16),
    decoder("GPT-NeoX", "GPTNeoXForCausalLM"),
    decoder("OPT", "OPTForCausalLM", ffn_dim=2 * WIDTH, word_embed_proj_dim=WIDTH),
    decoder("BLOOM", "BloomForCausalLM", n_layer=2, n_head=4),
    decoder("Llama", "LlamaForCausalLM"),
    decoder("Mistral", "MistralForCausalLM", sliding_window=16),
    decoder("Qwen2", "Qwen2ForCausalLM"),
    decoder("Qwen3", "Qwen3ForCausalLM", head_dim=12),
    decoder("Gemma 2", "Gemma2ForCausalLM", head_dim=12, sliding_window=16),
    decoder("Gemma 3", "Gemma3ForCausalLM", head_dim=12, sliding_window=16),
    decoder("Phi-3", "Phi3ForCausalLM"),
    decoder("Falcon", "FalconForCausalLM", new_decoder_architecture=True, num_kv_heads=2),
    decoder("StableLM", "StableLmForCausalLM", partial_rotary_factor=0.5),
    decoder("OLMo 2", "Olmo2ForCausalLM"),
    decoder("Mixtral", "MixtralForCausalLM", "text, mixture of experts", num_local_experts=4, num_experts_per_tok=2),
    decoder("Qwen3 MoE", "Qwen3MoeForCausalLM", "text, mixture of experts", num_experts=4, head_dim=12, **EXPERTS),
    decoder("GPT-OSS", "GptOssForCausalLM", "text, mixture of experts", num_local_experts=4, head_dim=12, **EXPERTS),
    decoder(
        "DeepSeek-V3", "DeepseekV3ForCausalLM", "text, mixture of experts", num_key_value_heads=4, n_routed_experts=4,
        n_shared_experts=1, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, **EXPERTS,
    ),
    decoder("Mamba", "MambaForCausalLM", "text, state space", state_size=8),
    decoder("RecurrentGemma", "RecurrentGemmaForCausalLM", "text, state space", lru_width=WIDTH),
    decoder("RWKV", "RwkvForCausalLM", "text, state space", attention_hidden_size=WIDTH, context_length=LENGTH),
    decoder(
        "Jamba", "JambaForCausalLM", "text, state space", num_experts=2, use_mamba_kernels=False, mamba_d_state=8,
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
    ),
    encoder("BERT", "BertForMaskedLM"),
    encoder("RoBERTa", "RobertaForSequenceClassification", sequence_classes),
    encoder("DistilBERT", "DistilBertForMaskedLM", dim=WIDTH, n_layers=2, n_heads=4, hidden_dim=2 * WIDTH),
    encoder("ALBERT", "AlbertForMaskedLM", embedding_size=16),
    encoder("ELECTRA", "ElectraForSequenceClassification", sequence_classes, embedding_size=16),
    encoder(
        "DeBERTa-v2", "DebertaV2ForSequenceClassification", sequence_classes, relative_attention=True,
        position_buckets=16, pos_att_type=["p2c", "c2p"],
    ),
    encoder("MPNet", "MPNetForMaskedLM"),
    encoder("ConvBERT", "ConvBertForSequenceClassification", sequence_classes, embedding_size=16),
    Architecture("Funnel", "text, encoder", "FunnelForSequenceClassification",
                 {"vocab_size": VOCABULARY, "block_sizes": [1, 1], "d_model": WIDTH, "n_head": 4, "d_head": 12,
                  "d_inner": 2 * WIDTH, "num_labels": LABELS}, sequence_classes),
    Architecture("XLNet", "text, encoder", "XLNetForSequenceClassification",
                 {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layer": 2, "n_head": 4, "d_inner": 2 * WIDTH,
                  "num_labels": LABELS}, sequence_classes),
    encoder("SqueezeBERT", "SqueezeBertForSequenceClassification", sequence_classes, embedding_size=WIDTH),
    encoder("ModernBERT", "ModernBertForMaskedLM", language, **TOKENS, local_attention=16, cls_token_id=0,
            sep_token_id=1),
    encoder("Longformer", "LongformerForSequenceClassification", sequence_classes, attention_window=[8] * 2,
            pad_token_id=2),
    encoder("Nyströmformer", "NystromformerForSequenceClassification", sequence_classes, num_landmarks=8,
            segment_means_seq_len=LENGTH),
    t5("T5", "T5ForConditionalGeneration"),
    t5("LongT5", "LongT5ForConditionalGeneration", local_radius=7),
    t5("Switch Transformers", "SwitchTransformersForConditionalGeneration", num_experts=4, num_sparse_encoder_layers=1,
       num_sparse_decoder_layers=1),
    translator("BART", "BartForConditionalGeneration"),
    translator("Marian", "MarianMTModel"),
    image_encoder("ViT", "ViTForImageClassification"),
    image_encoder("BEiT", "BeitForImageClassification"),
    image_encoder("DINOv2", "Dinov2ForImageClassification"),
    vision("Swin", "SwinForImageClassification", image_size=32, patch_size=2, embed_dim=24, depths=[1, 2],
           num_heads=[2, 4], window_size=4),
    vision("ConvNeXT", "ConvNextForImageClassification", hidden_sizes=[16, 32], depths=[2, 2], num_stages=2),
    vision("ResNet", "ResNetForImageClassification", embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2],
           layer_type="basic"),
    vision("MobileNetV2", "MobileNetV2ForImageClassification", lambda: images(64), image_size=64,
           depth_multiplier=0.25),
    vision("EfficientNet", "EfficientNetForImageClassification", lambda: images(64), image_size=64,
           width_coefficient=0.25, depth_coefficient=0.2, hidden_dim=320),
    vision("PoolFormer", "PoolFormerForImageClassification", hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1]),
    vision("SegFormer", "SegformerForImageClassification", lambda: images(64), hidden_sizes=[8, 16, 24, 32],
           decoder_hidden_size=16, num_attention_heads=[1, 1, 2, 2]),
    vision("MobileViT", "MobileViTForImageClassification", lambda: images(64), image_size=64,
           hidden_sizes=[24, 32, 40], neck_hidden_sizes=[8, 16, 16, 24, 24, 24, 32]),
    speech("wav2vec 2.0", "Wav2Vec2ForSequenceClassification"),
    speech("HuBERT", "HubertForSequenceClassification"),
    speech("WavLM", "WavLMForSequenceClassification"),
    Architecture("Audio Spectrogram Transformer", "audio", "ASTForAudioClassification",
                 {**SIZES, "patch_size": 4, "frequency_stride": 4, "time_stride": 4, "num_mel_bins": 16,
                  "max_length": 64, "num_labels": LABELS}, spectrograms),
    Architecture("Whisper", "audio", "WhisperForConditionalGeneration",
                 {**translator("", "").config, "num_mel_bins": 8, "max_source_positions": LENGTH,
                  "max_target_positions": 32}, whisper),
    Architecture("Speech2Text", "audio", "Speech2TextForConditionalGeneration",
                 {**translator("", "").config, "input_feat_per_channel": 16, "conv_channels": 32,
                  "max_source_positions": 64, "max_target_positions": 32}, filter_banks),
    Architecture("CLIP", "multimodal", "CLIPModel",
                 {"text_config": tower(**TOKENS), "vision_config": tower(image_size=32, patch_size=4),
                  "projection_dim": 16}, image_and_text),
    Architecture("SigLIP", "multimodal", "SiglipModel",
                 {"text_config": tower(**TOKENS, projection_size=32),
                  "vision_config": tower(image_size=32, patch_size=4)}, image_and_text),
    Architecture("BLIP", "multimodal", "BlipForConditionalGeneration",
                 {"text_config": tower(**TOKENS, encoder_hidden_size=32),
                  "vision_config": tower(image_size=32, patch_size=4)}, captions),
    Architecture("LLaVA", "multimodal", "LlavaForConditionalGeneration",
                 {"text_config": {"model_type": "llama", **SIZES, **DECODER},
                  "vision_config": {"model_type": "clip_vision_model", **tower(image_size=32, patch_size=8)},
                  "image_token_id": 3, "image_token_index": 3, "vision_feature_layer": -1, "use_cache": False},
                 lambda: image_in_text(3, 16)),
    Architecture("PaliGemma", "multimodal", "PaliGemmaForConditionalGeneration",
                 {"text_config": {"model_type": "gemma", **SIZES, **DECODER, "head_dim": 12},
                  "vision_config": {"model_type": "siglip_vision_model", **tower(image_size=32, patch_size=8)},
                  "image_token_id": 3, "image_token_index": 3, "projection_dim": WIDTH, "use_cache": False},
                 lambda: {**image_in_text(3, 16), "token_type_ids": torch.ones(BATCH, LENGTH, dtype=torch.long)}),
    Architecture("ViLT", "multimodal", "ViltForQuestionAnswering",
                 {**SIZES, **IMAGE},
                 lambda: {"input_ids": ids(16), "pixel_values": torch.randn(BATCH, 3, 32, 32),
                          "labels": torch.rand(BATCH, LABELS)}),
)  # fmt: skip
