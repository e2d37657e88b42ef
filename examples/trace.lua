#!/usr/bin/env lua5.4
-- trace.lua MOUNT: every instruction of a guest, with the registers that it changed.
--
-- Lua has nothing but files, and needs no more.
local mount = assert(arg[1], "usage: trace.lua MOUNT")
local vm = ("%s/trace.%s"):format(mount, tostring({}):match("%x+$"))
assert(os.execute(("mkdir '%s'"):format(vm)))

local function read(name)
    local file = assert(io.open(vm .. "/" .. name, "rb"))
    local text = file:read("a")
    file:close()
    return text
end

local function write(name, data, offset)
    local file = assert(io.open(vm .. "/" .. name, "r+b"))
    file:setvbuf("no")
    file:seek("set", offset or 0)
    local done, reason = file:write(data)
    file:close()
    return done or error(("%s: %s: %s"):format(name, reason, read("error")))
end

local function registers()
    local values, order = {}, {}
    for name, value in read("registers"):gmatch("(%S+) 0x(%x+)\n") do
        values[name] = value
        order[#order + 1] = name
    end
    return values, order
end

-- How many steps of "halve it, or triple it and add one" 6 takes to 1.
local CODE, START = 0x1000, 6
local LISTING = {
    { "xor ecx, ecx", "31c9" },
    { "again: cmp eax, 1", "83f801" },
    { "je done", "7410" },
    { "inc ecx", "ffc1" },
    { "test al, 1", "a801" },
    { "jnz odd", "7504" },
    { "shr eax, 1", "d1e8" },
    { "jmp again", "ebf1" },
    { "odd: lea eax, [rax+rax*2+1]", "8d444001" },
    { "jmp again", "ebeb" },
    { "done: hlt", "f4" },
}

local function main()
    local machine_code, at, text_at = {}, CODE, {}
    for _, line in ipairs(LISTING) do
        text_at[at] = line[1]
        for byte in line[2]:gmatch("%x%x") do
            machine_code[#machine_code + 1] = string.char(tonumber(byte, 16))
        end
        at = at + #line[2] // 2
    end
    write("mode", "long")
    write("mem", table.concat(machine_code), CODE)
    write("registers", ("rip %#x\nrax %d\n"):format(CODE, START))

    local before, order = registers()
    local instructions = 0
    repeat
        local rip = tonumber(before.rip, 16)
        write("vm_run", "step")
        local after = registers()
        local changes = {}
        for _, name in ipairs(order) do
            if name ~= "rip" and after[name] ~= before[name] then
                changes[#changes + 1] = ("%s=%x"):format(name, tonumber(after[name], 16))
            end
        end
        local line = ("%x  %-28s %s"):format(rip, text_at[rip] or "?", table.concat(changes, " "))
        print((line:gsub("%s+$", "")))
        before = after
        instructions = instructions + 1
        local exit = read("exit")
    until exit:find("^hlt") or not exit:find("^debug cause=step")

    -- The same in Lua, counting instructions as the listing has them.
    local number, steps, expected = START, 0, 1
    while number ~= 1 do
        expected = expected + 7
        number = number % 2 == 0 and number // 2 or 3 * number + 1
        steps = steps + 1
    end
    expected = expected + 3
    print(("%d instructions, %d steps from %d to %d"):format(
        instructions, tonumber(before.rcx, 16), START, tonumber(before.rax, 16)))
    assert(read("exit"):find("^hlt"), "it should have ended with hlt")
    assert(tonumber(before.rcx, 16) == steps and instructions == expected, "that is wrong")
end

local ok, reason = xpcall(main, debug.traceback)
os.remove(vm)
if not ok then
    io.stderr:write(reason, "\n")
    os.exit(1)
end
