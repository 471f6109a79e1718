/**
 * A network of its own for a test: machines in network namespaces, joined by a bridge in one more, so that nothing of it
 * is seen outside, and all of it goes with the namespaces. Needs root, and `ip` of iproute2.
 */
const PREFIX = "10.0.0.";

export interface Machine {
  readonly address: string;
  /** A command that runs another on it. */
  readonly runBy: string[];
  /** Pulls its cable: whatever is sent from or to it is lost, and nobody is told. */
  cut(): void;
  /** Loses what it sends, or what it is sent; undefined where there is no nft. */
  deafen: ((direction: "input" | "output") => void) | undefined;
  /** As it was. */
  heal(): void;
}

export interface Network extends Disposable {
  readonly machines: Machine[];
}

/** Why there can be none here, if so. */
export function whyNoNetwork(): string | undefined {
  if (process.getuid?.() !== 0) return "only root can make network namespaces";
  if (!Bun.which("ip")) return "ip is not installed";
  try {
    makeNetwork(1)[Symbol.dispose]();
    return undefined;
  } catch (error) {
    return (error as Error).message;
  }
}

export function makeNetwork(count: number): Network {
  const name = `reprise-${process.pid}-${Math.random().toString(36).slice(2, 8)}`;
  const bridge = `${name}-bridge`;
  const names = Array.from({ length: count }, (_, index) => `${name}-${index + 1}`);
  const dispose = () => {
    for (const each of [...names, bridge]) Bun.spawnSync(["ip", "netns", "del", each], { stderr: "ignore" });
  };
  try {
    ip("netns", "add", bridge);
    ip("-n", bridge, "link", "add", "bridge", "type", "bridge");
    ip("-n", bridge, "link", "set", "bridge", "up");
    const machines = names.map((each, index) => makeMachine(each, bridge, index + 1));
    return { machines, [Symbol.dispose]: dispose };
  } catch (error) {
    dispose();
    throw error;
  }
}

function makeMachine(name: string, bridge: string, number: number): Machine {
  const address = PREFIX + number;
  const port = `port${number}`;
  const runBy = ["ip", "netns", "exec", name];
  ip("netns", "add", name);
  ip("-n", name, "link", "set", "lo", "up");
  ip("-n", bridge, "link", "add", port, "type", "veth", "peer", "name", "eth", "netns", name);
  ip("-n", bridge, "link", "set", port, "master", "bridge", "up");
  ip("-n", name, "address", "add", `${address}/24`, "dev", "eth");
  ip("-n", name, "link", "set", "eth", "up");
  const nft = (...words: string[]) => run([...runBy, "nft", ...words]);
  const lose = (hook: string) => {
    nft("add", "table", "inet", "loss");
    nft("add", "chain", "inet", "loss", hook, `{ type filter hook ${hook} priority 0; policy accept; }`);
    nft("add", "rule", "inet", "loss", hook, hook === "input" ? "iifname" : "oifname", "eth", "drop");
  };
  let isDeaf = false;
  return {
    address,
    runBy,
    cut: () => ip("-n", bridge, "link", "set", port, "down"),
    deafen: Bun.which("nft")
      ? (direction) => {
          isDeaf = true;
          lose(direction);
        }
      : undefined,
    heal: () => {
      ip("-n", bridge, "link", "set", port, "up");
      if (isDeaf) nft("delete", "table", "inet", "loss");
      isDeaf = false;
    },
  };
}

function ip(...words: string[]): void {
  run(["ip", ...words]);
}

function run(cmd: string[]): void {
  const { exitCode, stderr } = Bun.spawnSync(cmd, { stdio: ["ignore", "ignore", "pipe"] });
  if (exitCode !== 0) throw new Error(`${cmd.join(" ")}: ${stderr.toString().trim()}`);
}
