from fastprice.cli import main

main()
