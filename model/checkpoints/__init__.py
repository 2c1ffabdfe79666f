"""Reads Hugging Face checkpoints: checks everything first, then loads the trunk or single experts.

    checkpoint    opens a model directory; every error of a checkpoint is found here, in one line
    raw           reads JSON files as they are written, without torch
    limits        bounds on the numbers of a configuration
    stored        finds tensors in safetensors files and reads their bytes
    packed        stands a packed weight for the stored tensors that make it (model/formats/ knows how)
    servability   a dry run on the meta device, which finds out whether the engine can serve the model
    wrapped       the text model inside a checkpoint that has more parts
    conversion    which stored tensors make which parameters, and how
    kept          the form in which packed experts can be kept as they come, and one expert in it
    loading       loads the trunk, and any experts
    quiet         switches off transformers' progress bars and log records

The room leaves packing and placing of the loaded tensors to model/fitting/ and model/experts/.
"""
