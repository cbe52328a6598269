"""Dolly: fine-tune an open causal language model on your own instructions, and chat with it.

The modules in reading order; each imports only from those named before it:

    errors, prompt, similar, records     what a mistake, a prompt, near-duplicates and a record are
    language, faults                     what is wrong with one record
    doctor, doctor_report                what is wrong with a file of records, by line
    config                               what a setting is
    launch                               what the first of several processes prepares for all
    packing, loops, model, adapters      token rows; a base and the package, which does not loop; LoRA and QLoRA
    attention, head                      a row's documents apart; the LM head and its loss in one
    progress, distributed, checkpoint    what one sees of a run; its processes; its state, whole or absent
    trainer, engine                      the training loop; the token loop of the chat
    prepare                              all that is known, and checked, before a model is loaded
    evaluate, curve                      measures of a model beside its base; whether more data would help
    plot, report                         the training curve; the card of a model
    hub, dataset, space, llama_cpp       pushing models, data and Spaces to the Hugging Face Hub; a copy for llama.cpp
    feedback                             from the chat back to the data
    texts, chat                          the words of the Gradio page, and the page
"""

import logging
import os

# Read when the libraries are imported: nothing is reported to anyone unless the user switches it on.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
# bitsandbytes says when imported that it would like another package, for a format that is not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
