"""ONNX in and out: foreign models become Programs, and every result is written as a model that ONNX Runtime runs.

    program = import_onnx("model.onnx")        # checked against ONNX Runtime where that is installed
    written = write_onnx(program, "model.onnx")

`edgec.onnx.operators` is the table of operators that are read, `edgec.onnx.emitters` that of those that are written.
"""
