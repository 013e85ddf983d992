package sockstat

//go:generate go tool bpf2go -cc clang-14 -strip llvm-strip-14 -target bpfel -type record -cflags "-O2 -g -Wall -Werror -mcpu=v3" sockets bpf/sockets.bpf.c
