from gfnem.cli import main

raise SystemExit(main())
