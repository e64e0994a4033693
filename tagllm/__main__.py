from tagllm.cli import main

main()
