"""M4V-dist: train long text-to-video models with multimodal Mamba blocks on Ray and DeepSpeed."""
