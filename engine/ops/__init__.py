from engine.ops.reference import cottention_features, gelu_new, recurrent_step, rotary_table
