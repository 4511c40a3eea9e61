# Written for the tests: a LoKr on Flux.1 dev by sd-scripts with LyCORIS, by its command line.
accelerate launch --mixed_precision bf16 --num_cpu_threads_per_process 1 flux_train_network.py \
  --pretrained_model_name_or_path flux1-dev.safetensors --clip_l clip_l.safetensors --t5xxl t5xxl_fp16.safetensors --ae ae.safetensors \
  --dataset_config kohya_flux_dataset.toml --output_dir output --output_name my-lokr \
  --network_module lycoris.kohya --network_dim 100000 --network_alpha 1 \
  --network_args "algo=lokr" "factor=12" "preset=full" "rank_dropout=0" \
  --network_train_unet_only --cache_latents_to_disk --cache_text_encoder_outputs --cache_text_encoder_outputs_to_disk \
  --optimizer_type adamw8bit --learning_rate 4e-4 --lr_scheduler cosine --lr_warmup_steps 0.05 --max_train_steps 1000 \
  --timestep_sampling shift --discrete_flow_shift 3.1582 --model_prediction_type raw --guidance_scale 1.0 \
  --mixed_precision bf16 --fp8_base --blocks_to_swap 12 --gradient_checkpointing --sdpa --highvram --seed 42 \
  --save_every_n_epochs 4 --loss_type l2
