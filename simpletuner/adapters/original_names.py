"""Layer names of diffusers beside those of the models' original layouts; `*` is a block's number.

Rows with the same original name are one fused layer there, its parts in this order. `~` marks layers whose rows are a shift and a scale
there and a scale and a shift here, which a changed name alone does not carry over. Where such a layer has more parts than these two, as the
text side of all but Stable Diffusion 3's last block, they lie in the same order.
"""

REORDERED = "~"
UNETS = ("sd", "sdxl")
"""Layouts whose names follow from the blocks: see `key_maps`."""

Table = tuple[tuple[str, str], ...]


def _table(*groups: tuple[str, str, str]) -> Table:
    """Rows from groups of (block in diffusers, block in the original, pairs of names)."""
    rows: list[tuple[str, str]] = []
    for block, original, pairs in groups:
        for pair in pairs.split():
            name, there = pair.split("=")
            mark = REORDERED if there.startswith(REORDERED) else ""
            rows.append((block + name, mark + original + there.removeprefix(REORDERED)))
    return tuple(rows)


AURAFLOW = _table(
    (
        "joint_transformer_blocks.*.",
        "double_layers.*.",
        """attn.to_q=attn.w2q attn.to_k=attn.w2k attn.to_v=attn.w2v attn.to_out.0=attn.w2o
        attn.add_q_proj=attn.w1q attn.add_k_proj=attn.w1k attn.add_v_proj=attn.w1v attn.to_add_out=attn.w1o
        ff.linear_1=mlpX.c_fc1 ff.linear_2=mlpX.c_fc2 ff.out_projection=mlpX.c_proj
        ff_context.linear_1=mlpC.c_fc1 ff_context.linear_2=mlpC.c_fc2 ff_context.out_projection=mlpC.c_proj
        norm1.linear=modX.1 norm1_context.linear=modC.1""",
    ),
    (
        "single_transformer_blocks.*.",
        "single_layers.*.",
        """attn.to_q=attn.w1q attn.to_k=attn.w1k attn.to_v=attn.w1v attn.to_out.0=attn.w1o
        ff.linear_1=mlp.c_fc1 ff.linear_2=mlp.c_fc2 ff.out_projection=mlp.c_proj norm1.linear=modCX.1""",
    ),
    (
        "",
        "",
        """time_step_proj.linear_1=t_embedder.mlp.0 time_step_proj.linear_2=t_embedder.mlp.2 context_embedder=cond_seq_linear
        pos_embed.proj=init_x_linear proj_out=final_linear norm_out.linear=~modF.1""",
    ),
)
FLUX = _table(
    (
        "transformer_blocks.*.",
        "double_blocks.*.",
        """attn.to_q=img_attn.qkv attn.to_k=img_attn.qkv attn.to_v=img_attn.qkv
        attn.add_q_proj=txt_attn.qkv attn.add_k_proj=txt_attn.qkv attn.add_v_proj=txt_attn.qkv
        attn.to_out.0=img_attn.proj attn.to_add_out=txt_attn.proj norm1.linear=img_mod.lin norm1_context.linear=txt_mod.lin
        ff.net.0.proj=img_mlp.0 ff.net.2=img_mlp.2 ff_context.net.0.proj=txt_mlp.0 ff_context.net.2=txt_mlp.2""",
    ),
    (
        "single_transformer_blocks.*.",
        "single_blocks.*.",
        "attn.to_q=linear1 attn.to_k=linear1 attn.to_v=linear1 proj_mlp=linear1 proj_out=linear2 norm.linear=modulation.lin",
    ),
    (
        "",
        "",
        """x_embedder=img_in context_embedder=txt_in proj_out=final_layer.linear norm_out.linear=~final_layer.adaLN_modulation.1
        time_text_embed.timestep_embedder.linear_1=time_in.in_layer time_text_embed.timestep_embedder.linear_2=time_in.out_layer
        time_text_embed.text_embedder.linear_1=vector_in.in_layer time_text_embed.text_embedder.linear_2=vector_in.out_layer
        time_text_embed.guidance_embedder.linear_1=guidance_in.in_layer time_text_embed.guidance_embedder.linear_2=guidance_in.out_layer""",
    ),
)
FLUX2 = _table(
    (
        "transformer_blocks.*.",
        "double_blocks.*.",
        """attn.to_q=img_attn.qkv attn.to_k=img_attn.qkv attn.to_v=img_attn.qkv
        attn.add_q_proj=txt_attn.qkv attn.add_k_proj=txt_attn.qkv attn.add_v_proj=txt_attn.qkv
        attn.to_out.0=img_attn.proj attn.to_add_out=txt_attn.proj ff.linear_in=img_mlp.0 ff.linear_out=img_mlp.2
        ff_context.linear_in=txt_mlp.0 ff_context.linear_out=txt_mlp.2""",
    ),
    ("single_transformer_blocks.*.", "single_blocks.*.", "attn.to_qkv_mlp_proj=linear1 attn.to_out=linear2"),
    (
        "",
        "",
        """x_embedder=img_in context_embedder=txt_in proj_out=final_layer.linear norm_out.linear=~final_layer.adaLN_modulation.1
        time_guidance_embed.timestep_embedder.linear_1=time_in.in_layer time_guidance_embed.timestep_embedder.linear_2=time_in.out_layer
        time_guidance_embed.guidance_embedder.linear_1=guidance_in.in_layer time_guidance_embed.guidance_embedder.linear_2=guidance_in.out_layer
        double_stream_modulation_img.linear=double_stream_modulation_img.lin double_stream_modulation_txt.linear=double_stream_modulation_txt.lin
        single_stream_modulation.linear=single_stream_modulation.lin""",
    ),
)
CHROMA = FLUX + _table(
    (
        "distilled_guidance_layer.",
        "distilled_guidance_layer.",
        "in_proj=in_proj out_proj=out_proj layers.*.linear_1=layers.*.in_layer layers.*.linear_2=layers.*.out_layer",
    ),
)
SD3 = _table(
    (
        "transformer_blocks.*.",
        "joint_blocks.*.x_block.",
        """attn.to_q=attn.qkv attn.to_k=attn.qkv attn.to_v=attn.qkv attn.to_out.0=attn.proj
        attn2.to_q=attn2.qkv attn2.to_k=attn2.qkv attn2.to_v=attn2.qkv attn2.to_out.0=attn2.proj
        ff.net.0.proj=mlp.fc1 ff.net.2=mlp.fc2 norm1.linear=adaLN_modulation.1""",
    ),
    (
        "transformer_blocks.*.",
        "joint_blocks.*.context_block.",
        """attn.add_q_proj=attn.qkv attn.add_k_proj=attn.qkv attn.add_v_proj=attn.qkv attn.to_add_out=attn.proj
        ff_context.net.0.proj=mlp.fc1 ff_context.net.2=mlp.fc2 norm1_context.linear=~adaLN_modulation.1""",
    ),
    (
        "",
        "",
        """context_embedder=context_embedder pos_embed.proj=x_embedder.proj proj_out=final_layer.linear
        norm_out.linear=~final_layer.adaLN_modulation.1
        time_text_embed.timestep_embedder.linear_1=t_embedder.mlp.0 time_text_embed.timestep_embedder.linear_2=t_embedder.mlp.2
        time_text_embed.text_embedder.linear_1=y_embedder.mlp.0 time_text_embed.text_embedder.linear_2=y_embedder.mlp.2""",
    ),
)
LUMINA2 = _table(
    *(
        (
            f"{block}.*.",
            f"{block}.*.",
            """attn.to_q=attention.qkv attn.to_k=attention.qkv attn.to_v=attention.qkv attn.to_out.0=attention.out
            feed_forward.linear_1=feed_forward.w1 feed_forward.linear_2=feed_forward.w2 feed_forward.linear_3=feed_forward.w3
            norm1.linear=adaLN_modulation.1""",
        )
        for block in ("layers", "noise_refiner", "context_refiner")
    ),
    (
        "",
        "",
        """x_embedder=x_embedder norm_out.linear_1=final_layer.adaLN_modulation.1 norm_out.linear_2=final_layer.linear
        time_caption_embed.timestep_embedder.linear_1=t_embedder.mlp.0 time_caption_embed.timestep_embedder.linear_2=t_embedder.mlp.2
        time_caption_embed.caption_embedder.1=cap_embedder.1""",
    ),
)
PIXART = _table(
    (
        "transformer_blocks.*.",
        "blocks.*.",
        """attn1.to_q=attn.qkv attn1.to_k=attn.qkv attn1.to_v=attn.qkv attn1.to_out.0=attn.proj
        attn2.to_q=cross_attn.q_linear attn2.to_k=cross_attn.kv_linear attn2.to_v=cross_attn.kv_linear attn2.to_out.0=cross_attn.proj
        ff.net.0.proj=mlp.fc1 ff.net.2=mlp.fc2""",
    ),
    (
        "",
        "",
        """pos_embed.proj=x_embedder.proj proj_out=final_layer.linear adaln_single.linear=t_block.1
        caption_projection.linear_1=y_embedder.y_proj.fc1 caption_projection.linear_2=y_embedder.y_proj.fc2
        adaln_single.emb.timestep_embedder.linear_1=t_embedder.mlp.0 adaln_single.emb.timestep_embedder.linear_2=t_embedder.mlp.2
        adaln_single.emb.resolution_embedder.linear_1=csize_embedder.mlp.0 adaln_single.emb.resolution_embedder.linear_2=csize_embedder.mlp.2
        adaln_single.emb.aspect_ratio_embedder.linear_1=ar_embedder.mlp.0 adaln_single.emb.aspect_ratio_embedder.linear_2=ar_embedder.mlp.2""",
    ),
)
Z_IMAGE = _table(
    *(
        (
            f"{block}.*.",
            f"{block}.*.",
            """attention.to_q=attention.qkv attention.to_k=attention.qkv attention.to_v=attention.qkv attention.to_out.0=attention.out
            feed_forward.w1=feed_forward.w1 feed_forward.w2=feed_forward.w2 feed_forward.w3=feed_forward.w3
            adaLN_modulation.0=adaLN_modulation.0""",
        )
        for block in ("layers", "noise_refiner", "context_refiner")
    ),
    (
        "",
        "",
        """all_x_embedder.2-1=x_embedder all_final_layer.2-1.linear=final_layer.linear
        all_final_layer.2-1.adaLN_modulation.1=final_layer.adaLN_modulation.1
        t_embedder.mlp.0=t_embedder.mlp.0 t_embedder.mlp.2=t_embedder.mlp.2 cap_embedder.1=cap_embedder.1""",
    ),
)
TABLES: dict[str, Table] = {
    "auraflow": AURAFLOW,
    "chroma": CHROMA,
    "flux": FLUX,
    "flux2": FLUX2,
    "lumina2": LUMINA2,
    "pixart": PIXART,
    "sd3": SD3,
    "z_image": Z_IMAGE,
}
"""By the name that a family states as its `original_layout`."""
UNCHANGED = ("qwen_image",)
"""Layouts that are diffusers' own: its makers published the model so."""
LOKR_IN_DIFFUSERS = ("flux2", "z_image")
"""Layouts of models whose pipelines in diffusers (0.42) read LoKr too; the others read LoRA alone."""
KOHYA_BY_DIFFUSERS = ("sd", "qwen_image", "z_image")
"""Layouts for which kohya's scripts (sd-scripts, musubi-tuner) name layers as diffusers does, not as the makers did."""
TEXT_PREFIXES: dict[str, tuple[str, ...]] = {"clip": ("lora_te_", "lora_te1_"), "clip_l": ("lora_te1_", "lora_te_"), "clip_g": ("lora_te2_",)}
"""Layouts of text encoders (the only one of a model, or the first and the second of several) to what kohya's scripts write before a name of
theirs; ComfyUI takes the others too."""
COMFYUI_PREFIXES: dict[str, tuple[str, ...]] = {
    "sd": ("lora_unet_", "lycoris_"),
    "sdxl": ("lora_unet_", "lycoris_"),
    "auraflow": ("transformer.",),
    "flux": ("transformer.", "lycoris_", "lora_transformer_", ""),
    "chroma": ("transformer.", "lycoris_", "lora_transformer_", ""),
    "flux2": ("transformer.", "lycoris_", "lora_transformer_", ""),
    "lumina2": (),
    "pixart": ("transformer.", "base_model.model.", "unet.base_model.model."),
    "qwen_image": ("transformer.", "lycoris_", ""),
    "sd3": ("transformer.", "lycoris_", "lora_transformer_", "base_model.model."),
    "z_image": ("transformer.", "lycoris_", "diffusion_model.", ""),
}
"""What ComfyUI takes before a name of diffusers, whose dots become underscores after an underscore."""
