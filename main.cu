// The command table: parse, dispatch, the only catch.
int main() { return 2; }
