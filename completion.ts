/**
 * The shell's completion scripts, made from the commands as they are declared.
 *
 * ```sh
 * source <(bun client.ts completion bash)      # or zsh
 * bun client.ts completion fish | source
 * ```
 *
 * A script knows commands and options by itself, so that Tab costs no process for them; names on the server it asks of
 * `client.ts complete`. What a word or a value is follows from its declaration (`kindOf`): a new command needs nothing
 * here.
 */
import { join } from "node:path";
import type { ArgDef, ArgsDef } from "citty";
import { type Command, shownCommands, usage } from "./command.ts";

/** What can stand at a place; a text with bars is a choice of words. */
export type Kind = "remote" | "local" | "folder" | "nothing" | `${string}|${string}`;

export interface DeclaredOption {
  /** As typed: `-o`, `--output`. */
  flags: string[];
  description: string;
  /** What its value is; undefined where it takes none. */
  value: Kind | undefined;
}

export interface DeclaredCommand {
  /** Empty for the client itself, without a command. */
  name: string;
  description: string;
  options: DeclaredOption[];
  /** What its words are, in their order. */
  words: Kind[];
  /** The last of its words may come again and again. */
  isOpen: boolean;
}

const SHELLS = { bash: bashScript, zsh: zshScript, fish: fishScript };
const CLIENT = [process.execPath, join(import.meta.dir, "client.ts")];
const NAMES = ["reprise", "client.ts", "./client.ts"];
/** The place of the last word, where there can be any number. */
const MANY_WORDS = 1_000_000;
const HELP: DeclaredOption = { flags: ["-h", "--help"], description: "Show what there is", value: undefined };
const VERSION: DeclaredOption = { flags: ["--version"], description: "Show the version", value: undefined };

/** The script for `shell` that completes the command line of `main`. Throws `usage` for a shell that is not known. */
export function completionScript(shell: string, main: Command): string {
  if (!Object.hasOwn(SHELLS, shell)) {
    throw usage(`completion is made for ${Object.keys(SHELLS).join(", ")}, not ${JSON.stringify(shell)}`);
  }
  return SHELLS[shell as keyof typeof SHELLS](declaredCommands(main));
}

/** What can be completed: `main` itself under the name "", then each command that is not hidden. */
export function declaredCommands(main: Command): DeclaredCommand[] {
  const commands = main.subCommands as Record<string, Command>;
  const named = shownCommands(main).map((name) => declared(name, commands[name]!, [HELP]));
  return [declared("", main, [VERSION, HELP]), ...named];
}

function declared(name: string, command: Command, builtIn: DeclaredOption[]): DeclaredCommand {
  const args = Object.entries((command.args ?? {}) as ArgsDef);
  const words = args.filter(([, definition]) => definition.type === "positional");
  const options = args.filter(([, definition]) => definition.type !== "positional");
  return {
    name,
    description: (command.meta as { description?: string }).description ?? "",
    options: [...options.map(([option, definition]) => declaredOption(option, definition)), ...builtIn],
    words: words.map(([, definition]) => kindOf(definition)),
    isOpen: words.at(-1)?.[0].endsWith("…") ?? false,
  };
}

function declaredOption(name: string, definition: ArgDef): DeclaredOption {
  const letters = "alias" in definition ? [definition.alias ?? []].flat() : [];
  return {
    flags: [...letters.map((letter) => `-${letter}`), `--${name}`],
    description: definition.description ?? "",
    value: definition.type === "boolean" ? undefined : kindOf(definition),
  };
}

/** By what the user is told: a description with "on the server", else the hint; a command's other words are files here. */
function kindOf({ type, description = "", valueHint = "" }: ArgDef): Kind {
  if (/\bon the server\b/i.test(description)) return "remote";
  if (valueHint.includes("|")) return valueHint as Kind;
  if (valueHint === "dir") return "folder";
  return type === "positional" || valueHint === "file" ? "local" : "nothing";
}

/** In single quotes where it needs them, for bash and zsh. */
function quoted(text: string): string {
  return isPlain(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

function isPlain(text: string): boolean {
  return /^[\w./-]+$/.test(text);
}

/** The first lines of every script. `shim` is how its shell makes a command of a bun and a path. */
function heading(shell: string, load: string, shim: string): string {
  return `# Completion of the reprise client in ${shell}: ${load}
#
# It completes ${NAMES.join(", ")}. Without reprise on the PATH, give it that name first:
#   ${shim}`;
}

/** What bash and zsh have in common: `reprise` as a command, not as an alias, which zsh would replace before it completes. */
const SHIM = `reprise() { ${CLIENT.map(quoted).join(" ")} "$@"; }`;
const ASK = `_reprise_ask() {
  ${CLIENT.map(quoted).join(" ")} complete "$@" 2>/dev/null
}`;

// ---------------------------------------------------------------------------------------------------- bash

const BASH_FUNCTIONS = `# Reads the line up to the cursor as the shell will: \`whole\` takes the words before the last, \`typed\` the last,
# \`kept\` what readline leaves alone of that, which replaces no more than the last $2 letters, and \`quote\` a quote that
# is still open.
_reprise_split() {
  local line=$1 letter word='' begun='' i
  for ((i = 0; i <= \${#line}; i++)); do
    ((i == \${#line} - $2)) && kept=$word
    letter=\${line:i:1}
    if [[ $letter == "\\\\" && $quote != "'" ]]; then
      ((++i))
      letter=\${line:i:1} begun=1
      [[ $quote && $letter != [\\$\\\`\\"\\\\] ]] && word+="\\\\"
      word+=$letter
    elif [[ $quote ]]; then
      [[ $letter == "$quote" ]] && quote='' || word+=$letter
    elif [[ $letter == ["'\\""] ]]; then
      quote=$letter begun=1
    elif [[ $letter == [[:blank:]] ]]; then
      [[ $begun ]] && whole+=("$word")
      word='' begun=''
    else
      word+=$letter begun=1
    fi
  done
  typed=$word
}

# Takes a whole word: an option, the value of one, the command's name, or one of the command's words.
_reprise_take() {
  if [[ $pending ]]; then
    [[ $pending == --server ]] && server=(--server "$1")
    pending=''
  elif [[ $1 == -- && ! $ended ]]; then
    ended=1
  elif [[ $1 == -?* && ! $ended ]]; then
    [[ $1 == --server=* ]] && server=("$1")
    # Of letters in one word only the last can take a value.
    local flag=$1
    [[ $1 == -[!-]* ]] && flag=-\${1: -1}
    [[ $flag != *=* && \${values[$flag]} ]] && pending=$flag
  elif [[ ! $command ]]; then
    command=$1
    _reprise_declared "$1"
  else
    ((place++))
  fi
}

# Makes a name what has to stand on the line. Not left to readline, which takes $( in a name for a substitution.
_reprise_quote() {
  local name=$1
  case $quote in
  "'") name=\${name//"'"/"'\\''"} ;;
  '"')
    name=\${name//'\\'/'\\\\'}
    name=\${name//'$'/'\\$'}
    name=\${name//'\`'/'\\\`'}
    name=\${name//'"'/'\\"'}
    # History is looked up between these quotes too.
    name=\${name//'!'/"\\"'!'\\""}
    ;;
  *) printf -v name %q "$name" ;;
  esac
  COMPREPLY=("$name")
}

_reprise_remote() {
  local name
  while IFS= read -r name; do
    [[ $name == "$typed"* ]] && COMPREPLY+=("\${name#"$kept"}")
  done < <(_reprise_ask "\${server[@]}" -- "$typed")
  compopt -o filenames
  # Of several readline shows a list, and quotes no more than what they have in common.
  [[ \${#COMPREPLY[@]} == 1 ]] || return
  _reprise_quote "\${COMPREPLY[0]}"
  compopt -o noquote
  # A folder goes on.
  [[ \${COMPREPLY[0]} == */ ]] && compopt -o nospace
}

# Files here are left to readline, which completes them where a function gives nothing.
_reprise_offer() {
  case $1 in
  remote) _reprise_remote ;;
  local) compopt -o default ;;
  folder) compopt -o dirnames ;;
  nothing) ;;
  *) mapfile -t COMPREPLY < <(IFS='| ' && compgen -W "$1" -- "$typed") ;;
  esac
}

_reprise() {
  local -a whole=() places=() server=()
  local -A values=()
  local -i place=0
  local typed='' kept='' quote='' options='' further='' command='' pending='' ended='' word
  COMPREPLY=()
  _reprise_split "\${COMP_LINE:0:COMP_POINT}" "\${#2}"
  _reprise_declared ''
  for word in "\${whole[@]:1}"; do _reprise_take "$word"; done
  if [[ $pending ]]; then
    _reprise_offer "\${values[$pending]}"
  elif [[ $typed == -*=* && ! $ended ]]; then
    word=\${typed%%=*} typed=\${typed#*=} kept=\${kept#*=}
    _reprise_offer "\${values[$word]:-nothing}"
  elif [[ $typed == -* && ! $ended ]]; then
    _reprise_offer "$options"
  else
    _reprise_offer "\${places[place]:-$further}"
  fi
}`;

function bashScript(commands: DeclaredCommand[]): string {
  const [main, ...named] = commands as [DeclaredCommand, ...DeclaredCommand[]];
  const names = named.map(({ name }) => name).join("|") as Kind;
  return `${heading("bash", "source <(reprise completion bash)", SHIM)}

${ASK}

# What a command takes: its options, what the values of some are, what its words are, and what any further ones.
_reprise_declared() {
  case $1 in
${[{ ...main, words: [names] }, ...named].map(bashCase).join("\n")}
  *) options='' values=() places=() further=nothing ;;
  esac
}

${BASH_FUNCTIONS}

complete -F _reprise ${NAMES.join(" ")}`;
}

function bashCase({ name, options, words, isOpen }: DeclaredCommand): string {
  const valued = options.flatMap(({ flags, value }) =>
    value ? flags.map((flag) => `[${flag}]=${quoted(value)}`) : [],
  );
  return `  ${quoted(name)})
    options=${quoted(options.flatMap(({ flags }) => flags).join(" "))}
    values=(${valued.join(" ")})
    places=(${words.map(quoted).join(" ")}) further=${isOpen ? quoted(words.at(-1)!) : "nothing"}
    ;;`;
}

// ---------------------------------------------------------------------------------------------------- zsh

const ZSH_FUNCTIONS = `# Sets \`server\` to what the line says of it, before the command or as an option.
_reprise_server() {
  local word
  local -i at
  for word in \${(z)LBUFFER}; do
    [[ $word == REPRISE_SERVER=* ]] && server=(--server "\${(Q)word#*=}")
  done
  for ((at = 2; at < CURRENT; at++)); do
    case $words[at] in
    --server) server=(--server "\${(Q)words[at + 1]}") ;;
    --server=*) server=("\${(Q)words[at]}") ;;
    esac
  done
}

_reprise_remote() {
  local -a names shown folders files expl
  local typed=\${(Q)PREFIX}
  local folder=\${(M)typed##*/}
  names=("\${(@f)$(_reprise_ask "\${(@)server}" -- "$typed")}")
  names=("\${(@)names#$folder}")
  shown=("\${(@M)names:#?*/}")
  folders=("\${(@)shown%/}")
  files=("\${(@)names:#(|*/)}")
  compset -P '*/'
  _description files expl 'on the server'
  compadd "$expl[@]" -q -S / -d shown -a folders
  compadd "$expl[@]" -a files
}`;

function zshScript(commands: DeclaredCommand[]): string {
  const [main, ...named] = commands as [DeclaredCommand, ...DeclaredCommand[]];
  return `${heading("zsh", "source <(reprise completion zsh)", SHIM)}

${ASK}

_reprise_commands() {
  local -a commands=(
${named.map(({ name, description }) => `    ${quoted(`${name}:${description}`)}`).join("\n")}
  )
  _describe -t commands command commands
}

${ZSH_FUNCTIONS}

_reprise() {
  local context state state_descr line curcontext=$curcontext
  local -A opt_args
  local -a server
  _reprise_server
  _arguments -C -s -S : \\
${main.options.flatMap(zshOption).join(" \\\n")} \\
    '1:command:_reprise_commands' \\
    '*:::word:->word' && return
  [[ $state == word ]] || return
  words=("$line[1]" "\${(@)words}")
  ((CURRENT++))
  curcontext=\${curcontext%:*:*}:reprise-$line[1]:
  case $line[1] in
${named.map(zshCase).join("\n")}
  esac
}

(($+functions[compdef])) || { autoload -Uz compinit && compinit -i; }
compdef _reprise ${NAMES.slice(0, 2).join(" ")}`;
}

function zshCase({ name, options, words, isOpen }: DeclaredCommand): string {
  const places = words.map((kind, index) => {
    const place = isOpen && index === words.length - 1 ? "*" : index + 1;
    return `    ${quoted(`${place}:word:${zshAction(kind)}`)}`;
  });
  return `  ${name})
    _arguments -s -S : \\
${[...options.flatMap(zshOption), ...places].join(" \\\n")}
    ;;`;
}

/** A specification for each flag; one of them on the line excludes the others. */
function zshOption({ flags, description, value }: DeclaredOption): string[] {
  const explained = `[${description.replace(/[[\]\\]/g, "\\$&")}]`;
  return flags.map((flag) => {
    const joined = value && flag.startsWith("--") ? "=" : "";
    const argument = value ? `:value:${zshAction(value)}` : "";
    return `    ${quoted(`(${flags.join(" ")})${flag}${joined}${explained}${argument}`)}`;
  });
}

function zshAction(kind: Kind): string {
  const actions: Record<string, string> = {
    remote: "_reprise_remote",
    local: "_files",
    folder: "_files -/",
    nothing: " ",
  };
  return actions[kind] ?? `(${kind.replaceAll("|", " ")})`;
}

// ---------------------------------------------------------------------------------------------------- fish

const FISH_FUNCTIONS = `# The command's name, then a line for each whole word after it. Options and their values are no words.
function __reprise_words
    set -l line (commandline -opc)
    set -l valued (__reprise_valued '')
    set -l command
    set -l pending
    set -l ended
    for word in $line[2..]
        if set -q pending[1]
            set pending
        else if test "x$word" = x--; and test -z "$ended"
            set ended 1
        else if string match -qr '^-.' -- "$word"; and test -z "$ended"
            # Of letters in one word only the last can take a value.
            set -l flag (string replace -r '^-[^-].*(.)$' -- '-$1' "$word")
            contains -- "$flag" $valued; and set pending 1
        else if not set -q command[1]
            set command $word
            set valued (__reprise_valued $command)
            echo $command
        else
            echo word
        end
    end
end

# True where the word at the cursor belongs to a command, as its FIRST to its LAST word.
function __reprise_at -a command first last
    set -l words (__reprise_words)
    test "$words[1]" = "$command"; or return
    test -z "$first"; or test (count $words) -ge "$first" -a (count $words) -le "$last"
end

function __reprise_server
    set -l line (commandline -opc)
    for at in (seq (count $line))
        switch $line[$at]
            case --server
                printf '%s\\n' --server $line[(math $at + 1)]
            case '--server=*'
                echo $line[$at]
        end
    end
end

# The word at the cursor, or the value in it, as typed.
function __reprise_typed
    commandline -ct | string replace -r '^--[\\w-]+=' ''
end

function __reprise_remote
    set -l typed (__reprise_typed)
    # A quote may still be open.
    for end in '' '"' "'"
        if set -l word (string unescape -- "$typed$end")
            __reprise_ask (__reprise_server) -- "$word"
            return
        end
    end
end`;

function fishScript(commands: DeclaredCommand[]): string {
  const [bun, client] = CLIENT.map(fishQuoted);
  return `${heading("fish", "reprise completion fish | source", `function reprise; ${bun} ${client} $argv; end`)}

function __reprise_ask
    ${bun} ${client} complete $argv 2>/dev/null
end

# The options of a command that have a value.
function __reprise_valued -a command
    switch "$command"
${commands.flatMap(fishCase).join("\n")}
    end
end

${FISH_FUNCTIONS}

for name in ${NAMES.slice(0, 2).join(" ")}
    complete -c $name -f
${commands.map(fishCompletes).join("\n")}
end`;
}

function fishCase({ name, options }: DeclaredCommand): string[] {
  const valued = options.flatMap(({ flags, value }) => (value ? flags : []));
  if (valued.length === 0) return [];
  return [`        case ${fishQuoted(name)}\n            printf '%s\\n' ${valued.join(" ")}`];
}

/** The name of a command, its options and its words. */
function fishCompletes({ name, description, options, words, isOpen }: DeclaredCommand): string {
  const complete = "    complete -c $name";
  const at = (place = "") => `-n "__reprise_at ${name || "''"}${place}"`;
  const places = words.map((kind, index) => {
    const last = isOpen && index === words.length - 1 ? MANY_WORDS : index + 1;
    return `${complete} ${at(` ${index + 1} ${last}`)} ${fishOffer(kind)}`;
  });
  return [
    ...(name === "" ? [] : [`${complete} -n "__reprise_at ''" -a ${name} -d ${fishQuoted(description)}`]),
    ...options.map((option) => `${complete} ${at()} ${fishOption(option)}`),
    ...places,
  ].join("\n");
}

function fishOption({ flags, description, value }: DeclaredOption): string {
  const named = flags.map((flag) => (flag.startsWith("--") ? `-l ${flag.slice(2)}` : `-s ${flag.slice(1)}`));
  return [...named, ...(value ? ["-r", fishOffer(value)] : []), "-d", fishQuoted(description)].join(" ");
}

function fishOffer(kind: Kind): string {
  const offers: Record<string, string> = {
    remote: "-f -a '(__reprise_remote)'",
    local: "-F",
    folder: "-f -a '(__fish_complete_directories (__reprise_typed))'",
    nothing: "-f",
  };
  return offers[kind] ?? `-f -a ${fishQuoted(kind.replaceAll("|", " "))}`;
}

/** In single quotes, between which fish knows two escapes. */
function fishQuoted(text: string): string {
  return isPlain(text) ? text : `'${text.replace(/[\\']/g, "\\$&")}'`;
}
