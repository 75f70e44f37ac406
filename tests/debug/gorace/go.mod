module gorace

go 1.19
