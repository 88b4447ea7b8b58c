"""minivlp: vision-language pretraining from scratch. A file here is one idea, in the order of the course.

Pictures and words become rows, and rows look at rows.

    patch        a picture becomes rows of patches
    text         a caption becomes ids: WordPiece, cut greedily from a vocabulary that is learned
    attention    every query takes a mean of the values, weighted by how its match with their keys compares
    masks        who sees whom: one small table says what kind of model a transformer is
    pooling      learned queries read a picture of any size
    transformer  LayerNorm, the block, the encoder, and blocks that look across at other tokens
    build_vilt   ViLT whole, in functions: its blocks, its losses, its optimisers and its loop on one page
    decoder      RMSNorm, rotary positions, QK-norm; and writing, one token after the other

What is hidden, what is matched, what learns.

    mlm          masked words
    targets      one array of labels: next words, hidden patches, spans moved to the end
    vq           a vector becomes the number of its nearest code: pictures as words
    lora         what learns: a frozen weight and a change of low rank beside it
    itm          does the caption belong to the picture? Wrong pairs, and hard ones

From densities to partners.

    nce          data or noise?
    infonce      CLIP's loss: every picture finds its text among all, and back
    sigmoid      SigLIP's loss: every pair is judged by itself
    hinge        VSE++'s loss: the hardest negative by a margin
    filip        late interaction: tokens find tokens

Transport, best partners, places.

    sinkhorn     optimal transport with entropy
    ipot         optimal transport by proximal steps, and word-patch alignment
    chamfer      every row's best partner
    boxes        L1 and generalised IoU
    regions      a box becomes tokens

Generators as judges.

    diffusion    a picture drowns in noise, and a network learns which noise it was
    bayes        a model that tells how likely a picture is also chooses its caption
    information  what one thing tells of another, in nats

    stream       the one tile loop behind all fused rungs

The rooms: what ideas may import, and what is made of them.

    core         checks of arguments, files written whole, what the transports share
    kernels      the tile loop in Triton
    models       architectures, and the names of published weights
    recipes      ways of training: batches, loss, measures
    training     the loop, the run folder, several processes
    data         drawings, scenes, captions, probes
    evaluation   measures beside chance, with intervals
    pictures     figures, sheets, demos
    bench        time and memory beside other libraries
    claims       the papers' claims, tested again
"""
